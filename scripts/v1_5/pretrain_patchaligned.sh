#!/usr/bin/env bash
# Stage 1 of the paper: pretrain.sh plus the patch loss on the regions of PAD, its weight beta growing from 0 to 5.
# Nothing else differs from the baseline. Variables: see common.sh; PAD_PATH is the annotation file.
set -euo pipefail
cd "$(dirname "$0")/../.."

stage=pretrain run=-patchaligned-pretrain global_batch=256 learning_rate=1e-3
source scripts/v1_5/common.sh
need "$PAD_PATH" "bash scripts/prepare_data.sh --check"

launch patch_aligned/train_mem.py \
    --patch_data_path "$PAD_PATH" \
    --patch_beta_start 0 \
    --patch_beta_end 5 \
    --patch_min_coverage 0.5 \
    "${common_flags[@]}" "$@"
