#!/usr/bin/env bash
# Runs the tests: those that need neither a GPU nor the network. Further arguments go to pytest, as in
# `bash scripts/test.sh -m golden` or `bash scripts/test.sh tests/patch_aligned`.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment analysis,mini,test pytest hypothesis deepspeed matplotlib gguf onnx

exec python -m pytest "$@"
