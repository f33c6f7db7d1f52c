# Sourced by quickstart.sh and test.sh from the repository's root: `use_environment EXTRAS DISTRIBUTION...` makes sure
# that `python` is one in which this checkout and the named distributions are installed.
#
# An active environment is used as it is; what it lacks is installed at the versions it can take, so that the torch of
# a GPU image stays. Where none is active, .venv is made with the tested set of constraints.txt.
#
#   TORCH=cpu   takes torch from PyTorch's index of CPU wheels: without CUDA's libraries, some 4 GB less
#   DRY_RUN=1   prints the commands that install, and stops
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"

environment_lacks() {
    # -I keeps the current folder, which also holds `llava`, off the path.
    ! python -I - "$PWD" "$@" 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import distribution
from pathlib import Path

import llava.constants

root, *names = sys.argv[1:]
assert Path(llava.constants.__file__).resolve().parents[1] == Path(root).resolve(), "another checkout is installed"
for name in names:
    distribution(name)
PYTHON
}

# say_room FOLDER: pip finds out only after long downloads that the disk is full, so this says it before.
say_room() {
    local free_gb
    free_gb=$(df -Pk "$1" | awk 'NR == 2 { print int($4 / 1000000) }')
    echo "Packages take about 8 GB where there are none yet, most of it torch's CUDA libraries (TORCH=cpu leaves them out); $1 has $free_gb GB free."
}

use_environment() {
    local extras=$1 constraints=() pip=(python -m pip install --quiet --disable-pip-version-check)
    shift
    if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ]; then
        constraints=(--constraint constraints.txt)
        if [ -z "${DRY_RUN:-}" ]; then make_and_activate; fi
    fi
    if [ -n "${DRY_RUN:-}" ]; then
        pip=(echo "${pip[@]}")
    elif ! environment_lacks "$@"; then
        return
    else
        echo "Installing this checkout with [$extras] into ${VIRTUAL_ENV:-${CONDA_PREFIX:-?}}"
        say_room "${VIRTUAL_ENV:-${CONDA_PREFIX:-.}}"
    fi
    pip+=("${constraints[@]+"${constraints[@]}"}")
    case ${TORCH:-} in
        '')  ;;
        cpu) "${pip[@]}" --no-deps --index-url https://download.pytorch.org/whl/cpu torch torchvision ;;
        *)   echo "unknown TORCH=$TORCH; set cpu, or leave it out" >&2; return 1 ;;
    esac
    "${pip[@]}" -e ".[$extras]"
    [ -z "${DRY_RUN:-}" ] || exit 0
}

make_and_activate() {
    if [ ! -e .venv/bin/activate ]; then
        python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
            echo "python3 is $(python3 --version 2>&1); Python 3.10 or newer is needed. Activate one and run this again." >&2
            exit 1
        }
        echo "Making the virtual environment .venv"
        python3 -m venv .venv
    fi
    source .venv/bin/activate
}
