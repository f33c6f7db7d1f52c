#!/usr/bin/env bash
# Stage 1 of the paper: pretrain.sh plus the patch loss on the regions of PAD, with a weight beta that grows from 0 to 5.
# Nothing else differs from the baseline. Variables: see common.sh; PAD_PATH is the annotation file, PROGRAM another trainer.
set -euo pipefail
cd "$(dirname "$0")/../.."

stage=pretrain run=-patchaligned-pretrain
source scripts/v1_5/common.sh
share_out_batch "${GLOBAL_BATCH_SIZE:-256}"
need_data "${DATA_PATH:=$DATA/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}"
need "${PAD_PATH:=$DATA/PAD/pad_558k.jsonl}" "bash scripts/prepare_data.sh --check"

launch "${PROGRAM:-patch_aligned/train_mem.py}" \
    --patch_data_path "$PAD_PATH" \
    --patch_beta_start 0 \
    --patch_beta_end 5 \
    --patch_min_coverage 0.5 \
    --version plain \
    --tune_mm_mlp_adapter True \
    --image_aspect_ratio square \
    --model_name_or_path "$MODEL_NAME_OR_PATH" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type "$MM_PROJECTOR_TYPE" \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --data_path "$DATA_PATH" \
    --image_folder "${IMAGE_FOLDER:-$DATA/LLaVA-Pretrain/images}" \
    --lazy_preprocess True \
    --output_dir "$OUTPUT_DIR" \
    --num_train_epochs "${NUM_TRAIN_EPOCHS:-1}" \
    ${MAX_STEPS:+--max_steps "$MAX_STEPS"} \
    --per_device_train_batch_size "$PER_DEVICE_TRAIN_BATCH_SIZE" \
    --gradient_accumulation_steps "$accumulation" \
    --learning_rate "${LEARNING_RATE:-1e-3}" \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --model_max_length "${MODEL_MAX_LENGTH:-2048}" \
    --gradient_checkpointing "${GRADIENT_CHECKPOINTING:-True}" \
    --save_strategy steps \
    --save_steps "${SAVE_STEPS:-500}" \
    --save_total_limit "${SAVE_TOTAL_LIMIT:-1}" \
    --logging_steps "${LOGGING_STEPS:-1}" \
    --dataloader_num_workers "${DATALOADER_NUM_WORKERS:-4}" \
    --report_to "${REPORT_TO:-tensorboard}" \
    --seed "${SEED:-42}" \
    "${device_flags[@]}" "$@"
