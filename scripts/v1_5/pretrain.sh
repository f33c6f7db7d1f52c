#!/usr/bin/env bash
# Stage 1 of LLaVA-1.5, the paper's baseline: the projector learns from the captions of 558K images, one epoch, the
# vision tower and the LLM frozen. Images are cropped to the square. Variables: see common.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

stage=pretrain run=-pretrain global_batch=256 learning_rate=1e-3
source scripts/v1_5/common.sh

launch llava/train/train_mem.py "${common_flags[@]}" "$@"
