#!/usr/bin/env bash
# RefCOCO, RefCOCO+ and RefCOCOg by lmms-eval's own tasks, whose numbers the paper's baseline has (Tables 5 and 8).
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate legacy "$@"
