#!/usr/bin/env bash
# SEED-Bench, pictures and videos' frames.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate seed "$@"
