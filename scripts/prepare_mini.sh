#!/usr/bin/env bash
# The miniature world: two small real checkpoints (playground/mini/cache) and synthetic scenes with exact masks
# (playground/data/mini): 400 to train on, 50 held out. What is already there stays.
set -euo pipefail
cd "$(dirname "$0")/.."

python -m playground.mini.prepare_models
scenes=${DATA:-./playground/data}/mini
[ -e "$scenes/train/scenes.json" ] ||
    python -m playground.mini.make_scenes --style simple --split train --count 400 --seed 0 --out "$scenes/train"
[ -e "$scenes/held_out/scenes.json" ] ||
    python -m playground.mini.make_scenes --style simple --split held_out --count 50 --seed 0 --out "$scenes/held_out"
