#!/usr/bin/env bash
# Measures on one GPU, in at most nine minutes and without a network, what cannot be measured on a CPU. From a checkout;
# nothing has to be installed but the packages, of which WHEELS brings those that the machine lacks.
#
#   bash benchmarks/gpu.sh            writes table.md, report.json and rows.jsonl; --tiny runs all of it on the CPU
#
#   PARTS=stage_1,masks   parts to run (default: all, see `--help`)
#   OUT=FOLDER            where the table goes (default: benchmarks/results/gpu-CARD-DATE)
#   WHEELS=FOLDER         wheels to use beside what is installed, for this run alone
#   PYTHON=python3        the Python that has torch
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

if [ -n "${WHEELS:-}" ]; then
    packages=$(mktemp -d)
    trap 'rm -rf "$packages"' EXIT
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$packages" "$WHEELS"/*.whl
    PYTHONPATH="$PYTHONPATH:$packages"
fi

"$python" "$root/benchmarks/gpu.py" --seconds $((525 - SECONDS)) ${PARTS:+--parts "$PARTS"} ${OUT:+--out "$OUT"} "$@"
