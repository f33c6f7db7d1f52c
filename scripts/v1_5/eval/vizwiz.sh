#!/usr/bin/env bash
# VizWiz, val (Table 6). The file for the server's test split: --benchmarks vizwiz_test.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate vizwiz "$@"
