#!/usr/bin/env bash
# The experiment of the miniature: does patch-aligned training make a frozen LLM read what visual tokens show, and is it
# the word that does it? Trains all arms, measures them on test scenes, writes a report. Options go to the program:
#
#   bash playground/mini/reproduce.sh                    all arms, three seeds: three to four hours of two free cores
#   bash playground/mini/reproduce.sh --budget primary   the arms of the primary outcomes, three seeds: some 80 minutes
#   bash playground/mini/reproduce.sh --budget evening   the same, and stage 2 of C, P and R to 300 steps, one seed
#   bash playground/mini/reproduce.sh --budget nights    all arms with five seeds, stage 2 with three
#   bash playground/mini/reproduce.sh --budget internvl  C, P and R of a stitched model of transformers, two seeds
#   bash playground/mini/reproduce.sh --budget tiny      the same steps in small, in minutes
#   bash playground/mini/reproduce.sh --list             what is done and what is to do
#
# State and results go to ~/.cache/patch_aligned/reproduce, or to --state FOLDER. Called again, it continues.
set -euo pipefail
cd "$(dirname "$0")/../.."
source scripts/environment.sh
case " $* " in
    *internvl*) use_environment mini,analysis,train,dinov3 gguf onnx matplotlib trl torchvision ;;  # its processor's
    *)          use_environment mini,analysis gguf onnx matplotlib ;;
esac

exec python -m playground.mini.proof.reproduce "$@"
