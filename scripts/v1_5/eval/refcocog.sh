#!/usr/bin/env bash
# RefCOCOg, the splits of UMD, both readings of boxes (Tables 5 and 8).
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate refcocog_val,refcocog_test "$@"
