#!/usr/bin/env bash
# The miniature world: two small real checkpoints (playground/mini/cache) and synthetic scenes with exact masks
# (playground/data/mini), 1,600 to train on, 100 held out, and benchmarks. What is there already stays.
#
#   DATA=FOLDER   where the scenes go (./playground/data)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/help.sh
scenes=${DATA:-./playground/data}/mini

python -m playground.mini.prepare_models
python -m playground.mini.make_scenes --style simple --split train --count 1600 --out "$scenes/train"
python -m playground.mini.make_scenes --style simple --split heldout --count 100 --out "$scenes/heldout"
python -m playground.mini.evaluation_set  # always below ./playground/data, where the tasks of eval/lmms_tasks/mini look
