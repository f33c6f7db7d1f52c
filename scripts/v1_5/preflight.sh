#!/usr/bin/env bash
# What to run before a night of training: checks GPUs, versions, weights, data, images, regions and room on disk. Then
# trains 10 steps of the real command, saving and resuming on the way, and prints memory, time and disk of the whole run.
# Stops at the first thing that would fail, with exit code 1. Nothing stays behind but, after a failed step, its output.
#
#   bash scripts/v1_5/preflight.sh [SCRIPT] [FLAGS...]     SCRIPT is pretrain_patchaligned (default), pretrain, finetune,
#                                                          finetune_lora or finetune_qlora
#
# Variables and flags are those of SCRIPT; see common.sh.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/launching.sh

script=pretrain_patchaligned
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
    script=$(basename "$1" .sh)
    shift
fi
case $script in
    pretrain|pretrain_patchaligned|finetune|finetune_lora|finetune_qlora) ;;
    *) die "unknown script $script; choose pretrain_patchaligned, pretrain, finetune, finetune_lora or finetune_qlora" ;;
esac
command=$(DRY_RUN=1 bash "scripts/v1_5/$script.sh" "$@")
eval "exec python scripts/preflight.py $command"  # the command is printed quoted, ready to paste
