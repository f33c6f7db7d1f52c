#!/usr/bin/env bash
# Makes the inputs of a record, by the commit that is the baseline: bash tests/record/inputs.sh WORKTREE INPUTS
set -euo pipefail
exec python "$(cd "$(dirname "$0")" && pwd)/inputs.py" "$@"
