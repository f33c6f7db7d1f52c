#!/usr/bin/env bash
# Captions of COCO val2014 (Table 4), of a checkpoint of stage 1 with MODEL_BASE, or of stage 2. Flags of
# `python -m eval.captions` may follow; scoring needs Java.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

caption "$@"
