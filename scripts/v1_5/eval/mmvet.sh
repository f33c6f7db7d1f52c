#!/usr/bin/env bash
# MM-Vet (Table 7). A language model judges: OPENAI_API_KEY, or --judge-url and --judge-model.
set -euo pipefail
cd "$(dirname "$0")/../../.."
source scripts/v1_5/eval/common.sh

evaluate mmvet "$@"
