# What launching scripts share: how they refuse, run or print a command, and how many GPUs there are.

die() {
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit 1
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
