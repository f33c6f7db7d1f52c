#!/usr/bin/env bash
# The regions of LLaVA's 558K pretraining images, by RAM, Grounding DINO and SAM, or by SAM 3: one process a GPU, each
# with its own shards, then one file where the training scripts look for it. Called again, it resumes where it was
# interrupted.
#
# Every value in capitals is a default: set the variable of that name to change it. Any flag of `patch-aligned annotate`
# may follow the script's name. Paths count from the root of the repository.
#
#   NUM_GPUS=N      processes on this machine
#   NNODES=N NODE_RANK=I MASTER_ADDR=HOST    several machines with a shared folder: the same command on each, and once
#                   more on one of them, without these, when all are done: it merges
#   TASKS=N         this is one of N tasks of a Slurm array, with one GPU: see slurm/annotate_pad.sbatch
#   RAM=ram_plus    RAM++ instead of RAM
#   SEGMENTER=sam3  SAM 3 instead of Grounding DINO and SAM, from the hub or SAM3=FOLDER. Its weights are gated: ask for
#                   them under the SAM License at https://huggingface.co/facebook/sam3, then hf auth login
#   TAGGER=file PHRASES=FILE    phrases of a file instead of RAM's tags; or TAGGER=captions for those of the captions, or
#                   TAGGER=vlm VLM=MODEL for a vision-language model, with VLM_URL=http://localhost:8000/v1 on a server
#   MERGE=0         leave merging to a later call: the default of tasks and of several machines, which don't wait for
#                   each other
#   DRY_RUN=1       print the commands, ready to paste, and stop
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/launching.sh

DATA=${DATA:-./playground/data}
MODELS=${MODELS:-$DATA/annotation_models}
IMAGES=${IMAGES:-$DATA/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGE_FOLDER=${IMAGE_FOLDER:-$DATA/LLaVA-Pretrain/images}
OUTPUT=${OUTPUT:-$DATA/PAD/annotation}
PAD_PATH=${PAD_PATH:-$DATA/PAD/pad_558k.jsonl}
NNODES=${NNODES:-1}
case ${RAM:-ram} in
    ram)      weights=ram_swin_large_14m.pth ;;
    ram_plus) weights=ram_plus_swin_large_14m.pth ;;
    *)        die "unknown RAM=$RAM; choose ram or ram_plus" ;;
esac
TAGGER=${TAGGER:-ram}
SEGMENTER=${SEGMENTER:-gdino+sam}
RAM_WEIGHTS=${RAM_WEIGHTS:-$MODELS/$weights}
RAM_TAG_LIST=${RAM_TAG_LIST:-$MODELS/ram_tag_list.txt}
RAM_THRESHOLDS=${RAM_THRESHOLDS:-$MODELS/ram_tag_list_threshold.txt}
DETECTOR=${DETECTOR:-$MODELS/grounding-dino-tiny}
SAM=${SAM:-$MODELS/sam-vit-huge}

case $TAGGER in
    ram)
        for file in "$RAM_WEIGHTS" "$RAM_TAG_LIST" "$RAM_THRESHOLDS"; do
            need "$file" "patch-aligned models fetch --ram ${RAM:-ram} --output $MODELS"
        done
        models=(--ram "$RAM_WEIGHTS" --ram_tag_list "$RAM_TAG_LIST" --ram_thresholds "$RAM_THRESHOLDS") ;;
    file)     models=(--tagger file --phrases "${PHRASES:?set it to the file of phrases}") ;;
    captions) models=(--tagger captions) ;;
    vlm)      models=(--tagger vlm --vlm "${VLM:?set it to the model}" ${VLM_URL:+--vlm_url "$VLM_URL"}) ;;
    *)        die "unknown TAGGER=$TAGGER; choose ram, file, captions or vlm" ;;
esac
case $SEGMENTER in
    gdino+sam) models+=(--detector "$DETECTOR" --sam "$SAM") ;;
    sam3)      models+=(--segmenter sam3 --sam3 "${SAM3:-facebook/sam3}") ;;
    *)         die "unknown SEGMENTER=$SEGMENTER; choose gdino+sam or sam3" ;;
esac
need "$IMAGES" "bash scripts/prepare_data.sh --check"

# RANK and WORLD_SIZE of whatever started this script do not count: torchrun sets its own, a task has its id.
if [ -n "${TASKS:-}" ]; then
    launcher=(env RANK="${SLURM_ARRAY_TASK_ID:?TASKS is set, but no Slurm array has started this}" WORLD_SIZE="$TASKS"
        LOCAL_RANK=0)
    MERGE=${MERGE:-0}
else
    : "${NUM_GPUS:=$(count_gpus)}"
    need_number NUM_GPUS
    need_number NNODES
    launcher=(torchrun --nproc_per_node "$NUM_GPUS")
    if ((NNODES > 1)); then
        MERGE=${MERGE:-0}
        launcher+=(--nnodes "$NNODES" --node_rank "${NODE_RANK:?set it to the rank of this machine, from 0}"
            --master_addr "${MASTER_ADDR:?set it to the address of the machine of rank 0}"
            --master_port "${MASTER_PORT:-29500}")
    else
        launcher+=(--standalone)
    fi
    launcher+=(--no_python)
fi

# A detector's batch has images of one size, so the more images are in a chunk, the fuller its batches.
run "${launcher[@]}" patch-aligned annotate --engine torchrun --chunk 1024 \
    --images "$IMAGES" --image_folder "$IMAGE_FOLDER" --output "$OUTPUT" "${models[@]}" "$@"

if [ "${MERGE:-1}" = 1 ]; then
    run patch-aligned merge "$OUTPUT" --output "$PAD_PATH"
    # Some of millions of masks miss their box: they are listed, and only a broken file is a failure.
    run patch-aligned verify "$PAD_PATH" --fail_on broken_file
fi
