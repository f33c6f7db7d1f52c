#!/usr/bin/env bash
# Runs the checks that take too long for every change, one after another, and ends with a table:
#
#   floors   the default tests on the oldest versions that pyproject.toml allows
#   newest   the default tests on the newest releases that can be installed together
#   readme   the commands of README and docs/guide.md in order, in a clone and a clean shell; the log says which were
#            printed alone or not typed
#
# `bash scripts/nightly.sh floors` chooses steps by name. It fails where a step does.
#
#   PYTHON=python3   makes the environments, a fresh one for each step that needs one
#   WORK=FOLDER      where logs and environments go, by default a temporary folder. An environment takes about 8 GB and
#                    is deleted when its step ends.
set -uo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh

# To add a step, append its name here, write a function of that name below, and describe it above. What the function
# prints goes to WORK/NAME.log; it fails at its first command that fails.
STEPS=(floors newest readme)

# All but flash, which needs CUDA's compiler, and dev.
EXTRAS=analysis,annotate,demo,dinov3,eval,mini,test,train

floors() {
    fresh_environment
    python -m pip install --quiet uv
    python -m uv pip install --quiet --resolution lowest-direct --editable ".[$EXTRAS]"
    default_tests
}

newest() {
    fresh_environment
    python -m pip install --quiet --editable ".[$EXTRAS]"
    default_tests
}

readme() {
    say_room "$WORK"
    git clone --quiet . "$WORK/venv"  # deleted when the step ends, as environments are
    python3 scripts/type_readme.py README.md docs/guide.md >"$WORK/readme.sh"
    cd "$WORK/venv"
    env -u PYTHONPATH -u CONDA_DEFAULT_ENV -u VIRTUAL_ENV PATH="${PATH//${VIRTUAL_ENV:-no environment}\/bin:/}" \
        bash --noprofile --norc "$WORK/readme.sh" </dev/null
}

fresh_environment() {
    say_room "$WORK"
    "${PYTHON:-python3}" -m venv "$WORK/venv"
    source "$WORK/venv/bin/activate"
    export TORCH_EXTENSIONS_DIR=$WORK/venv/torch_extensions  # DeepSpeed's optimizer, built for this torch
}

default_tests() {
    python -m pip freeze
    bash scripts/test.sh
}

for step in "$@"; do
    [[ " ${STEPS[*]} " == *" $step "* ]] || { echo "found step '$step', expected one of: ${STEPS[*]}" >&2; exit 2; }
done
[ $# -gt 0 ] || set -- "${STEPS[@]}"
WORK=$(mkdir -p "${WORK:=$(mktemp -d)}" && cd "$WORK" && pwd)
trap 'rm -rf "$WORK/venv"' EXIT

table=() status=0
for step in "$@"; do
    echo "$step: $WORK/$step.log"
    began=$SECONDS
    (set -e; "$step") >"$WORK/$step.log" 2>&1  # not in a condition, where set -e has no effect
    if [ $? = 0 ]; then result=passed; else result=FAILED status=1; fi
    rm -rf "$WORK/venv"
    last=$(tail -n 1 "$WORK/$step.log" | tr -d '=')
    table+=("$(printf '%-8s %-7s %4d min %s' "$step" $result $(((SECONDS - began + 59) / 60)) "$last")")
done
printf '\n%s\n' "step     result  time      last line of its log"
printf '%s\n' "${table[@]}"
exit $status
