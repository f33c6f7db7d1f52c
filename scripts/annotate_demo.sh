#!/usr/bin/env bash
# The annotation pipeline from pictures to a checked data set, in a minute or two on two CPU cores. The models are tiny
# and random, so what they find is noise; the machinery is the real one. It is killed once on the way and resumes. At
# last the scenes' own regions take the models' place, and must come out as they went in.
#
#   SCENES=40      scenes of the miniature, beside some photographs that scikit-image ships
#   RUN=FOLDER     where everything goes; it is emptied first
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

RUN=${RUN:-runs/annotate_demo}
SCENES=${SCENES:-40}
PHOTOGRAPHS="astronaut.png camera.png chelsea.png coffee.png hubble_deep_field.jpg rocket.jpg"

say() { printf '\n[%d:%02d] %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"; }

# The call that is interrupted, repeated, and made once more in one go; --output follows.
annotate=(
    patch-aligned annotate --images "$RUN/pictures"
    --ram "$RUN/models/ram.converted.safetensors"
    --ram_tag_list "$RUN/models/ram_tag_list.txt"
    --ram_thresholds "$RUN/models/ram_thresholds.txt"
    --detector "$RUN/models/grounding_dino"
    --sam "$RUN/models/sam"
    --box_threshold 0.98 --shard_size 8 --decode_workers 2 --device cpu
)

say "1/7 Pictures and models"
use_environment demo scikit-image
rm -rf "$RUN"
mkdir -p "$RUN/pictures/photographs"
python -m playground.mini.make_scenes --style simple --split train --count "$SCENES" --out "$RUN/pictures"
shipped=$(python -c 'import pathlib, skimage; print(pathlib.Path(skimage.__file__).parent / "data")')
for name in $PHOTOGRAPHS; do
    cp "$shipped/$name" "$RUN/pictures/photographs/"
done
head -c 20000 "$shipped/rocket.jpg" >"$RUN/pictures/photographs/cut_off.jpg"
python -m playground.mini.annotation_models --out "$RUN/models" 2>/dev/null

say "2/7 Annotating, until it is killed"
"${annotate[@]}" --output "$RUN/run" >"$RUN/killed.log" 2>&1 &
process=$!
until compgen -G "$RUN/run/shards/*.gz" >/dev/null || ! kill -0 $process 2>/dev/null; do
    sleep 0.02
done
kill -KILL $process 2>/dev/null || true
wait $process 2>/dev/null || true
echo "Killed by SIGKILL. What it left:"
ls "$RUN/run/shards"

say "3/7 The same call resumes"
"${annotate[@]}" --output "$RUN/run"

say "4/7 Once more in one go, for comparison"
"${annotate[@]}" --output "$RUN/straight" >/dev/null
diff -r "$RUN/run/shards" "$RUN/straight/shards"
echo "The shards are equal, byte for byte."

say "5/7 One file, checked (noise needs no mask that fits its box), and a page to look at"
patch-aligned merge "$RUN/run" --output "$RUN/pad.jsonl.gz"
patch-aligned verify "$RUN/pad.jsonl.gz" --image_folder "$RUN/pictures" --min_mask_box_iou 0 --box_tolerance 1
patch-aligned view "$RUN/pad.jsonl.gz" --image_folder "$RUN/pictures" --output "$RUN/view.html"

say "6/7 The scenes' own tags, boxes and masks in the models' place"
python -m playground.mini.replay --images "$RUN/pictures/train.json" --image_folder "$RUN/pictures" --output "$RUN/replay" \
    --pad "$RUN/pictures/pad.json" --shard_size 8
patch-aligned merge "$RUN/replay" --output "$RUN/replay.json"
patch-aligned verify "$RUN/replay.json" --image_folder "$RUN/pictures"

say "7/7 What went in against what came out"
python scripts/compare_pad.py "$RUN/replay.json" "$RUN/pictures/pad.json"

say "Done"
echo "data set  $RUN/pad.jsonl.gz"
echo "page      $RUN/view.html"
