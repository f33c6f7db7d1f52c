#!/usr/bin/env bash
# The control of scripts/v1_5/pretrain_patchaligned.sh: the same, towards word embeddings that a random rotation about
# the mean label has turned. SEED is the rotation's, too.
set -euo pipefail
cd "$(dirname "$0")/../../.."

: "${OUTPUT_DIR:?set it to the folder of the run}"
export PROGRAM=playground/mini/train_rotated.py
exec bash scripts/v1_5/pretrain_patchaligned.sh --patch_rotation_seed "${SEED:-42}" "$@"
