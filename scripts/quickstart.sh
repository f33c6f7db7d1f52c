#!/usr/bin/env bash
# From a fresh clone to the paper's Table 3 in miniature, on two CPU cores: trains the projector of stage 1 twice from the
# same seed, once on captions alone and once with the patch loss, and analyses both, and an untrained one, on scenes held
# out. Ends with a table and a report in runs/quickstart. Called again, it skips what is done and continues what was
# interrupted.
#
#   STEPS=100         optimizer steps of each training, 8 scenes each: two passes over 400 scenes
#   RUN=FOLDER        where the results go; an empty folder starts anew
#   UPDATE_DOCS=1     also copies table and picture to docs/quickstart, and the table into the README
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

RUN=${RUN:-runs/quickstart}
STEPS=${STEPS:-100}
HELDOUT=${DATA:-playground/data}/mini/heldout

say() { printf '\n[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"; }

# train NAME SCRIPT: the training script as it stands, on the miniature, but for the schedule: in so few steps LLaVA's
# cosine has spent the learning rate by the time beta is large, so it stays constant after warm-up, for both.
train() {
    if [ -e "$RUN/$1/mm_projector.bin" ]; then
        echo "$RUN/$1 is trained already"
    else
        PRESET=mini MAX_STEPS=$STEPS OUTPUT_DIR=$RUN/$1 bash "scripts/v1_5/$2.sh" \
            --lr_scheduler_type constant_with_warmup
    fi
}

say "1/5 Environment"
use_environment mini,analysis gguf onnx matplotlib

say "2/5 Models and scenes"
bash scripts/prepare_mini.sh

say "3/5 Stage 1 on captions alone, $STEPS steps"
train captions pretrain

say "4/5 Stage 1 with the patch loss, $STEPS steps"
train patch_aligned pretrain_patchaligned

say "5/5 Analysis on held-out scenes"
patch-aligned analyze \
    --projector random=random:0 \
    --projector captions="$RUN/captions" \
    --projector patch_aligned="$RUN/patch_aligned" \
    --base playground/mini/cache/models/smollm2-135m-instruct \
    --data "$HELDOUT/pad.json" \
    --image-folder "$HELDOUT" \
    --output "$RUN"

if [ -n "${UPDATE_DOCS:-}" ]; then
    mkdir -p docs/quickstart
    cp "$RUN/report.md" "$RUN/localisation.png" docs/quickstart/
    python scripts/show_in_readme.py README.md docs/quickstart/report.md
fi
say "Done"
echo "report                $RUN/report.html"
echo "picture               $RUN/localisation.png"
echo "first training batch  $RUN/patch_aligned/first_batch.png"
echo
echo "next, in this folder:"
if [ "${VIRTUAL_ENV:-}" = "$PWD/.venv" ]; then echo "  source .venv/bin/activate"; fi
echo "  PRESET=mini bash scripts/v1_5/analyze.sh"
echo "  PRESET=mini bash scripts/v1_5/pretrain_patchaligned.sh && PRESET=mini bash scripts/v1_5/finetune.sh"
echo "  python -m llava.serve.cli --model-path checkpoints/llava-mini-patchaligned --image-file $HELDOUT/images/00000/simple_heldout_0_000001.jpg"
