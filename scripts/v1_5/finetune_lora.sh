#!/usr/bin/env bash
# Stage 2 with LoRA on the LLM (rank 128) instead of all its weights; the projector learns as in finetune.sh, at a rate of
# its own. STAGE1 as in finetune.sh. Variables: see common.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

stage=finetune_lora run=-lora global_batch=128 learning_rate=2e-4
source scripts/v1_5/common.sh

launch llava/train/train_mem.py "${lora_flags[@]}" "${common_flags[@]}" "$@"
