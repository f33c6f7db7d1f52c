#!/usr/bin/env bash
# Runs the tests that need neither a GPU nor the network, in a process a core. Arguments go to pytest:
# `bash scripts/test.sh -m golden` chooses by marker, `bash scripts/test.sh tests/patch_aligned` by folder, and
# `bash scripts/test.sh -n 0 --pdb` stops at the first failure, in one process.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment analysis,mini,test pytest pytest-xdist hypothesis deepspeed peft bitsandbytes matplotlib gguf onnx

# Of each option pytest takes the last, so one given on the command line replaces one of these. A process takes 1.5 GB.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n auto --maxprocesses 8 --dist worksteal -m "not gpu and not net" "$@"
