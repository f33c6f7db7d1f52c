#!/usr/bin/env bash
# From a fresh clone to the paper's claim in miniature, on two CPU cores: trains the projector of stage 1 twice from the
# same seed, on captions alone and with the patch loss, and measures both, and an untrained one, on scenes held out. Ends
# with a table, a picture and a report in runs/quickstart. Called again, it skips what is done and continues what was
# interrupted.
#
#   STEPS=48          optimizer steps of each training, 8 scenes each
#   WARMUP_STEPS=1600 patch steps before them, where there is a patch loss; they need no LLM, so they take seconds
#   RUN=FOLDER        where the results go; an empty folder starts a new run
#   SEED=42           of initialisation and order
#   TORCH=cpu         installs torch without CUDA's libraries; DRY_RUN=1 prints the commands that install, and stops
#   UPDATE_DOCS=1     also copies table and pictures to docs/quickstart, and the table into the README
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

RUN=${RUN:-runs/quickstart}
STEPS=${STEPS:-48}
WARMUP_STEPS=${WARMUP_STEPS:-1600}
HELDOUT=${DATA:-playground/data}/mini/heldout
PROJECTORS=(--projector captions="$RUN/captions" --projector patch_aligned="$RUN/patch_aligned")

say() { printf '\n[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"; }

# train NAME SCRIPT FLAGS...: the training script as it stands, on the miniature, but for the schedule: in so few steps
# LLaVA's cosine would have spent the learning rate, so it stays constant after its ramp, for both.
train() {
    local name=$1 script=$2
    if [ -e "$RUN/$name/mm_projector.bin" ]; then
        echo "$RUN/$name is trained already"
    else
        PRESET=mini MAX_STEPS=$STEPS OUTPUT_DIR=$RUN/$name bash "scripts/v1_5/$script.sh" \
            --lr_scheduler_type constant_with_warmup \
            --cache_features "$RUN/features" \
            "${@:3}"
    fi
}

say "1/6 Environment"
use_environment mini,analysis gguf onnx matplotlib
SECONDS=0 # installation is timed apart

say "2/6 Models and scenes"
bash scripts/prepare_mini.sh

say "3/6 Stage 1 on captions alone, $STEPS steps"
train captions pretrain

say "4/6 Stage 1 with the patch loss, $WARMUP_STEPS patch steps and $STEPS steps"
train patch_aligned pretrain_patchaligned \
    --patch_warmup_steps "$WARMUP_STEPS" \
    --patch_beta_start 5

say "5/6 Analysis on held-out scenes"
patch-aligned analyze \
    --projector random=random:0 \
    "${PROJECTORS[@]}" \
    --base playground/mini/cache/models/smollm2-135m-instruct \
    --data "$HELDOUT/pad.json" \
    --image-folder "$HELDOUT" \
    --region-kind object \
    --names auto \
    --name-stem "A picture of a" \
    --batch-size 25 \
    --output "$RUN"

say "6/6 Picture"
python -m playground.mini.proof.picture "${PROJECTORS[@]}" --scenes "$HELDOUT" --output "$RUN/words.png"

if [ -n "${UPDATE_DOCS:-}" ]; then
    mkdir -p docs/quickstart
    cp "$RUN/report.md" "$RUN/words.png" docs/quickstart/
    python scripts/show_in_readme.py README.md "$RUN/analysis.json"
fi
say "Done"
echo "report                $RUN/report.html"
echo "picture               $RUN/words.png"
echo "first training batch  $RUN/patch_aligned/first_batch.png"
echo
echo "next, in this folder:"
if [ "${VIRTUAL_ENV:-}" = "$PWD/.venv" ]; then echo "  source .venv/bin/activate"; fi
echo "  PRESET=mini bash scripts/v1_5/analyze.sh"
echo "  PRESET=mini bash scripts/v1_5/finetune.sh"
echo "  python -m llava.serve.cli --model-path checkpoints/llava-mini-patchaligned --image-file $HELDOUT/images/00000/simple_heldout_0_000001.jpg"
