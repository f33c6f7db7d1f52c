# What launching scripts share: how they refuse, run or print a command, and how many GPUs there are.
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"

die() {
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit 1
}

# Where no environment is active, the one that quickstart.sh made.
if [ -z "${VIRTUAL_ENV:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" = base ] && [ -e .venv/bin/activate ]; then
    source .venv/bin/activate
fi

# need_own_packages: refuses to start where python would import another package under the name of one of ours.
need_own_packages() {
    [ -n "${DRY_RUN:-}" ] || python llava/own_packages.py || exit 1
}

# need_number NAME: exits unless the value is a whole number of at least 1. Bash runs commands that it finds in the words
# of its arithmetic, so each variable is checked before.
need_number() {
    [[ ${!1} =~ ^[1-9][0-9]*$ ]] || die "$1=${!1}: expected a whole number, 1 or more"
}

# name_misspelt FILE...: names variables that are set and nearly spelt like those that the files read.
name_misspelt() {
    python - "$@" <<'PYTHON' >&2
import difflib, os, pathlib, re, sys

text = "".join(pathlib.Path(file).read_text(encoding="utf-8") for file in sys.argv[1:])
known = set(re.findall(r"\b[A-Z][A-Z0-9_]{2,}\b", text))
for name in sorted(set(os.environ) - known):
    if near := difflib.get_close_matches(name, known - set(os.environ), 1, 0.85):
        print(f"{name} is set, but nothing reads it. Is it {near[0]}?")
PYTHON
}

# need_gpu: refuses to start where there is none.
need_gpu() {
    [ -n "${DRY_RUN:-}" ] || nvidia-smi --list-gpus >/dev/null 2>&1 ||
        python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        die "found no GPU, and this trains on GPUs alone; PRESET=mini runs on the CPU, DRY_RUN=1 prints the command"
}

# need FILE COMMAND: refuses to start without FILE and says which command makes it.
need() {
    [ -n "${DRY_RUN:-}" ] || [ -e "$1" ] || die "no file $1; next: $2"
}

# run WORDS...: runs a command, or prints it.
run() {
    if [ -z "${DRY_RUN:-}" ]; then
        "$@"
    else
        printf '%q ' "$@"
        echo
    fi
}

count_gpus() {
    local listed
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        listed=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES")
    else
        listed=$(nvidia-smi --list-gpus 2>/dev/null || true)
    fi
    if [ -n "$listed" ]; then wc -l <<<"$listed"; else echo 8; fi
}

# supervise WORDS...: runs a launcher to its end and exits as it does. SIGTERM, SIGUSR1 and SIGINT go to the training
# processes, which save first: launchers end them after seconds, or leave them behind. The exit code is then 143, or 130.
supervise() {
    local status=0 code=
    [ "$1" != python ] || exec "$@"
    set -m # a process group of its own: Ctrl-C reaches the script alone
    "$@" &
    launcher_pid=$!
    set +m
    trap 'code=143; signal_ranks TERM' TERM
    trap 'code=143; signal_ranks USR1' USR1
    trap 'code=130; signal_ranks INT' INT
    wait_to_the_end "$launcher_pid" && status=0 || status=$?
    if ((status)); then exit "${code:-$status}"; fi
    exit 0
}

# wait_to_the_end PID: waits for a background process and returns its status, whatever signals come meanwhile.
wait_to_the_end() {
    until wait "$1" || true; ! kill -0 "$1" 2>/dev/null; do :; done
    wait "$1" # a signal ends a wait with its own number; this one finds that of the process
}

# signal_ranks NAME: signals the processes below the launcher that it gave a rank; the launcher while there are none.
signal_ranks() {
    local pid ranks=()
    for pid in $(ps -eo pid=,ppid= | awk -v top="$launcher_pid" '
        { parent[$1] = $2 }
        END { for (pid in parent) { up = pid; while (up != top && up in parent) up = parent[up]; if (up == top) print pid } }')
    do
        if grep -qsz '^LOCAL_RANK=' "/proc/$pid/environ"; then ranks+=("$pid"); fi
    done
    kill -s "$1" "${ranks[@]:-$launcher_pid}" 2>/dev/null || true
}
