#!/usr/bin/env bash
# OK-VQA, val2014 (Table 6).
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate okvqa "$@"
