#!/usr/bin/env bash
# Records what the product does on small inputs, one JSON file a part, for compare.py.
#
#   bash tests/record/record.sh OUT --inputs DIR [--tree DIR] [--parts a,b] [--whole] [--jobs 2]
#
#   OUT            folder of the record; its files are replaced
#   --inputs DIR   what inputs.sh made
#   --tree DIR     the checkout to record; default: the one this script lies in
#   --parts a,b    only these; default: all of the quick part
#   --whole        what is slow too
set -euo pipefail
exec python "$(cd "$(dirname "$0")" && pwd)/record.py" "$@"
