#!/usr/bin/env bash
# MMMU, validation (Table 7). The file for the server's test split: --benchmarks mmmu_test.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate mmmu "$@"
