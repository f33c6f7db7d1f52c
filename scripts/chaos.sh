#!/usr/bin/env bash
# Kills a training, an annotation and an evaluation of tiny models at random moments, resumes each with the same command,
# and compares what they leave with a run that nothing stopped: losses, and files byte for byte. Ends with a table, and
# with exit status 1 where anything differs. No network and no GPU; at most 20 minutes on two free cores.
#
#   ROUNDS=20     kills of each: in turn SIGKILL at any moment, SIGKILL while it writes, SIGTERM, and a full disk
#   SEED=0        of the moments
#   WORK=FOLDER   where everything goes, by default a temporary folder, which is deleted. What differs is named there.
#
# A full disk is a small tmpfs, which root alone may mount; the table says where that was left out.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/launching.sh
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=1
if [ -z "${WORK:-}" ]; then
    WORK=$(mktemp -d)
    trap 'umount "$WORK"/*/* 2>/dev/null || true; rm -rf "$WORK"' EXIT  # a disk is left where this is stopped itself
    trap 'exit 143' TERM INT
fi
python scripts/chaos.py --rounds "${ROUNDS:-20}" --seed "${SEED:-0}" --work "$WORK"
