#!/usr/bin/env bash
# MMBench-EN, dev, letters read without a judge (Table 7). The server's test split: --benchmarks mmbench_en_test.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate mmbench_en "$@"
