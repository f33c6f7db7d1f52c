#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5: the LLM and the projector learn from 665K instructions, one epoch, the vision tower frozen.
# Images are padded to the square. STAGE1=patchaligned starts from the projector of pretrain_patchaligned.sh, the
# paper's row (default); STAGE1=captions from that of pretrain.sh, the baseline. Variables: see common.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

stage=finetune run='' global_batch=128 learning_rate=2e-5
source scripts/v1_5/common.sh

launch llava/train/train_mem.py "${common_flags[@]}" "$@"
