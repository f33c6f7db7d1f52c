#!/usr/bin/env bash
# Tables 5 to 7 and the benchmarks beside them, the model loaded once. Leave some out with --without mmvet,rec.
# PRESET=mini: the miniature's own benchmarks, with captions, on the CPU. Captions of COCO: captions.sh.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

if [ "$PRESET" = mini ] && [ -z "${SKIP_CAPTIONS:-}" ]; then caption "$1"; fi
evaluate all "$@"
