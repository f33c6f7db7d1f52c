#!/usr/bin/env bash
# Stage 2 with LoRA on the LLM (rank 128) instead of all its weights; the projector learns as in finetune.sh, with its own
# learning rate. STAGE1 as in finetune.sh. Variables: see common.sh. A checkpoint takes about 5 GB.
set -euo pipefail
cd "$(dirname "$0")/../.."

stage=finetune_lora run=-lora
source scripts/v1_5/common.sh
share_out_batch "${GLOBAL_BATCH_SIZE:-128}"
need_data "${DATA_PATH:=$DATA/llava_v1_5_mix665k.json}"

launch llava/train/train_mem.py \
    --lora_enable True \
    --lora_r "${LORA_R:-128}" \
    --lora_alpha "${LORA_ALPHA:-256}" \
    --mm_projector_lr "${MM_PROJECTOR_LR:-2e-5}" \
    --version "${VERSION:-v1}" \
    --pretrain_mm_mlp_adapter "$PRETRAIN_MM_MLP_ADAPTER" \
    --image_aspect_ratio pad \
    --group_by_modality_length True \
    --model_name_or_path "$MODEL_NAME_OR_PATH" \
    --vision_tower "$VISION_TOWER" \
    --mm_projector_type "$MM_PROJECTOR_TYPE" \
    --mm_vision_select_layer -2 \
    --mm_use_im_start_end False \
    --mm_use_im_patch_token False \
    --data_path "$DATA_PATH" \
    --image_folder "${IMAGE_FOLDER:-$DATA}" \
    --lazy_preprocess True \
    --output_dir "$OUTPUT_DIR" \
    --num_train_epochs "${NUM_TRAIN_EPOCHS:-1}" \
    ${MAX_STEPS:+--max_steps "$MAX_STEPS"} \
    --per_device_train_batch_size "$PER_DEVICE_TRAIN_BATCH_SIZE" \
    --gradient_accumulation_steps "$accumulation" \
    --learning_rate "${LEARNING_RATE:-2e-4}" \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --model_max_length "${MODEL_MAX_LENGTH:-2048}" \
    --gradient_checkpointing "${GRADIENT_CHECKPOINTING:-True}" \
    --save_strategy steps \
    --save_steps "${SAVE_STEPS:-1000}" \
    --save_total_limit "${SAVE_TOTAL_LIMIT:-1}" \
    --logging_steps "${LOGGING_STEPS:-1}" \
    --dataloader_num_workers "${DATALOADER_NUM_WORKERS:-4}" \
    --report_to "${REPORT_TO:-tensorboard}" \
    --seed "${SEED:-42}" \
    "${device_flags[@]}" "$@"
