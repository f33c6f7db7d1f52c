#!/usr/bin/env bash
# `bash scripts/prepare_data.sh --check` says where the data of both stages belongs, what is there and what is missing.
# Nothing is downloaded: the report ends with the commands that do.
#
#   DATA=FOLDER   where the data is (./playground/data)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/help.sh

case ${1:---check} in
    --check) exec python scripts/check_training_data.py --data "${DATA:-./playground/data}" ;;
    *)       echo "usage: [DATA=FOLDER] bash scripts/prepare_data.sh [--check]" >&2; exit 2 ;;
esac
