# What launching scripts share: how they refuse, and how many GPUs there are.

die() {
    printf '%s: %s\n' "$(basename "$0")" "$1" >&2
    exit 1
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
