#!/usr/bin/env bash
# MME, perception and cognition (Table 7).
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate mme "$@"
