#!/usr/bin/env bash
# Stage 2 of LLaVA-1.5: the LLM and the projector learn from 665K instructions for one epoch, with the vision tower frozen.
# Images are padded to the square. STAGE1=patchaligned starts from the projector of pretrain_patchaligned.sh, the
# paper's row (default); STAGE1=captions from that of pretrain.sh, the baseline. Variables: see common.sh.
# A checkpoint holds all weights and the optimizer: about 100 GB for 7B.
set -euo pipefail
cd "$(dirname "$0")/../.."

stage=finetune run=''
source scripts/v1_5/common.sh
share_out_batch "${GLOBAL_BATCH_SIZE:-128}"
need_data "${DATA_PATH:=$DATA/llava_v1_5_mix665k.json}"

launch llava/train/train_mem.py \
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
    --learning_rate "${LEARNING_RATE:-2e-5}" \
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
