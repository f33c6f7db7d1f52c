#!/usr/bin/env bash
# RefCOCO, the splits of UNC, both readings of boxes (Tables 5 and 8).
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate refcoco_val,refcoco_testA,refcoco_testB "$@"
