#!/usr/bin/env bash
# ScienceQA, questions with a picture, test (Table 6).
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate scienceqa "$@"
