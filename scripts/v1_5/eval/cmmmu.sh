#!/usr/bin/env bash
# CMMMU, val (Table 7). The file for the server's test split: --benchmarks cmmmu_test.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate cmmmu "$@"
