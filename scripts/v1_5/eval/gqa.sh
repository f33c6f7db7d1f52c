#!/usr/bin/env bash
# GQA, testdev balanced (Table 6).
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate gqa "$@"
