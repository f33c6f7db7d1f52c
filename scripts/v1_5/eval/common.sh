# What the evaluation scripts share. A script sources this file and calls `evaluate NAMES "$@"`.
#
#   bash scripts/v1_5/eval/gqa.sh CHECKPOINT [flags of `python -m eval.run`]
#
# Every value in capitals is a default: set the variable of that name to change it. Of two equal flags the last wins.
# Paths are relative to the root of the repository. The same command continues a stopped run.
#
#   NUM_GPUS=N                  one process a GPU, which share the rows; with 1, a process without a launcher
#   BATCH_SIZE=8                rows a process and call
#   OUTPUT=DIR                  folder of the runs; default: runs/eval/NAME of the checkpoint
#   MODEL_BASE=LLM              what a stage-1 projector or a LoRA adapter belongs to
#   PRESET=mini                 the miniature's own benchmarks, one process on the CPU: all.sh and captions.sh
#   DRY_RUN=1                   print the command, ready to paste, and stop

PRESET=${PRESET:-full}
DATA=${DATA:-./playground/data}
source scripts/launching.sh

case $PRESET in
    full) : "${NUM_GPUS:=$(count_gpus)}" ;;
    mini) NUM_GPUS=1 ;;
    *)    die "unknown PRESET=$PRESET; choose full or mini" ;;
esac
need_number NUM_GPUS
name_misspelt "$0" scripts/v1_5/eval/common.sh

case ${1:-} in
    '' | -*) die "expected a checkpoint first: bash scripts/v1_5/eval/$(basename "$0") CHECKPOINT [flags]" ;;
esac

# launch MODULE CHECKPOINT FLAGS...: starts a module in one process a GPU.
launch() {
    local module=$1 checkpoint=$2 launcher=(python)
    need_own_packages
    if [ "$PRESET" = mini ]; then
        launcher=(env CUDA_VISIBLE_DEVICES= python)
    elif ((NUM_GPUS > 1)); then
        launcher=(accelerate launch --multi_gpu --num_machines 1 --num_processes "$NUM_GPUS" --mixed_precision no
            --dynamo_backend no --main_process_port "${MASTER_PORT:-29500}")
    fi
    run "${launcher[@]}" -m "$module" --model-path "$checkpoint" ${MODEL_BASE:+--model-base "$MODEL_BASE"} \
        --batch-size "${BATCH_SIZE:-8}" ${OUTPUT:+--output "$OUTPUT"} "${@:3}"
}

# evaluate NAMES CHECKPOINT FLAGS...: benchmarks by lmms-eval.
evaluate() {
    local names=$1
    shift
    if [ "$PRESET" = mini ]; then
        [ "$names" = all ] || die "the miniature has benchmarks of its own; next: PRESET=mini bash scripts/v1_5/eval/all.sh $1"
        names=mini
        run python -m playground.mini.evaluation_set
    fi
    launch eval.run "$1" --benchmarks "$names" "${@:2}"
}

# caption CHECKPOINT FLAGS...: captions of a checkpoint of stage 1 or 2, and their scores.
caption() {
    local benchmark=captions_coco2014
    if [ "$PRESET" = mini ]; then
        benchmark=captions_mini
        run python -m playground.mini.make_scenes --style simple --split heldout --count 100 --out "$DATA/mini/heldout"
        run python -m playground.mini.reference_captions --data "$DATA/mini/heldout"
    fi
    launch eval.captions "$1" --benchmark "$benchmark" "${@:2}"
}
