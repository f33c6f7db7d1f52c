#!/usr/bin/env bash
# The paper's Tables 1 to 3 and Figures 1, 4, 5 and 6: an untrained projector, one trained on captions alone and the
# patch-aligned one, side by side in one report. Ends with whether Align(V, W) and the cosine rise in this order.
#
# Every value in capitals is a default: set the variable of that name to change it. Any flag of `patch-aligned analyze`
# may follow the script's name, such as --projector finetuned=FOLDER --image_aspect_ratio square: stage 2 pads its
# images, so one way must be chosen for all. Paths count from the root of the repository.
#
#   PRESET=mini RUN=FOLDER             the projectors of scripts/quickstart.sh, on CPU
#   CAPTIONS=FOLDER PATCH_ALIGNED=FOLDER BASE=PATH     others
#   ANNOTATIONS=FILE IMAGES=FOLDER LIMIT=100           another set: PAD, COCO's instances, GranD-f
#   DRY_RUN=1                          print the commands, ready to paste, and stop
set -euo pipefail
cd "$(dirname "$0")/../.."

DATA=${DATA:-./playground/data}
source scripts/launching.sh

case ${PRESET:-full} in
    full)
        checkpoints=./checkpoints/llava-v1.5-7b
        : "${CAPTIONS:=$checkpoints-pretrain}" "${PATCH_ALIGNED:=$checkpoints-patchaligned-pretrain}"
        : "${BASE:=lmsys/vicuna-7b-v1.5}" "${DEVICE:=cuda}" "${LIMIT:=100}"
        : "${ANNOTATIONS:=$DATA/coco/annotations/instances_val2017.json}" "${IMAGES:=$DATA/coco/val2017}"
        : "${OUTPUT:=./runs/analysis/llava-v1.5-7b}"
        trained="bash scripts/v1_5/pretrain.sh and pretrain_patchaligned.sh"
        found="unpack COCO's annotations_trainval2017.zip and val2017.zip in $DATA/coco"
        ;;
    mini)
        RUN=${RUN:-runs/quickstart}
        : "${CAPTIONS:=$RUN/captions}" "${PATCH_ALIGNED:=$RUN/patch_aligned}"
        : "${BASE:=./playground/mini/cache/models/smollm2-135m-instruct}" "${DEVICE:=cpu}"
        : "${ANNOTATIONS:=$DATA/mini/heldout/pad.json}" "${IMAGES:=$DATA/mini/heldout}"
        : "${OUTPUT:=$RUN/analysis}"
        trained="RUN=$RUN bash scripts/quickstart.sh"
        found="bash scripts/prepare_mini.sh"
        ;;
    *)
        die "unknown PRESET=$PRESET; choose full or mini"
        ;;
esac
need "$CAPTIONS" "$trained"
need "$PATCH_ALIGNED" "$trained"
need "$ANNOTATIONS" "$found"
need "$IMAGES" "$found"

run patch-aligned analyze \
    --projector random=random:0 \
    --projector captions="$CAPTIONS" \
    --projector patch_aligned="$PATCH_ALIGNED" \
    --base "$BASE" \
    --data "$ANNOTATIONS" \
    --image_folder "$IMAGES" \
    ${LIMIT:+--limit "$LIMIT"} \
    --seed "${SEED:-0}" \
    --device "$DEVICE" \
    --output "$OUTPUT" "$@"
run python scripts/check_order.py "$OUTPUT/analysis.json" random captions patch_aligned
