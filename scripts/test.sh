#!/usr/bin/env bash
# Runs the tests that need neither a GPU nor the network. Arguments go to pytest: `bash scripts/test.sh -m golden` chooses
# by marker, `bash scripts/test.sh tests/patch_aligned` by folder.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment analysis,mini,test pytest hypothesis deepspeed peft bitsandbytes matplotlib gguf onnx

# pytest takes the last -m, so one given on the command line replaces this one.
exec python -m pytest -m "not gpu and not net" "$@"
