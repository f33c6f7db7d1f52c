#!/usr/bin/env bash
# The control of scripts/v1_5/pretrain_patchaligned.sh: the same, towards word embeddings that a random rotation about
# the mean label has turned. SEED is the rotation's, too.
set -euo pipefail
cd "$(dirname "$0")/../../.."

stage=pretrain run=-rotated-pretrain global_batch=256 learning_rate=1e-3
source scripts/v1_5/common.sh

launch playground/mini/train_rotated.py \
    --patch_rotation_seed "${SEED:-42}" \
    --patch_data_path "$PAD_PATH" \
    --patch_beta_start 0 \
    --patch_beta_end 5 \
    --patch_min_coverage 0.5 \
    "${common_flags[@]}" "$@"
