#!/usr/bin/env bash
# Makes the pages of docs/pages, as the commands write them, from the projectors of scripts/quickstart.sh.
#
#   RUN=FOLDER   where the quickstart's results are
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment mini,analysis matplotlib

scenes=playground/data/mini/heldout pages=docs/pages written=$(mktemp -d)
trap 'rm -rf "$written"' EXIT
projectors=(--base playground/mini/cache/models/smollm2-135m-instruct)
for name in captions patch_aligned; do projectors+=(--projector "$name=${RUN:-runs/quickstart}/$name"); done

patch-aligned analyze "${projectors[@]}" --data $scenes/pad.json --image-folder $scenes --region-kind object \
    --picture-rows 2 --token-maps 0 --output "$written"
patch-aligned token-map "${projectors[@]}" --data $scenes/pad.json --image-folder $scenes --limit 2 --rounds 2 --output "$written"
mkdir -p $pages
cp "$written"/{report,token_map}.html $pages
patch-aligned view $scenes/pad.json --image-folder $scenes --limit 20 --grid 8 --side 112 --output $pages/view.html
