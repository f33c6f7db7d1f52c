#!/usr/bin/env bash
# POPE, all three kinds of negatives.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate pope "$@"
