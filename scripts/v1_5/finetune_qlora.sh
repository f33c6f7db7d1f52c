#!/usr/bin/env bash
# finetune_lora.sh with the LLM in 4 bits (nf4) and frozen: adapters and projector are trained beside it. Fits 7B and
# 13B on cards of 24 GB. STAGE1 as in finetune.sh. Variables: see common.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."

stage=finetune_qlora run=-qlora global_batch=128 learning_rate=2e-4
source scripts/v1_5/common.sh

launch llava/train/train_mem.py --bits 4 "${lora_flags[@]}" "${common_flags[@]}" "$@"
