#!/usr/bin/env bash
# TextVQA, val. The file for the server's test split: --benchmarks textvqa_test.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate textvqa "$@"
