# What the training scripts share: presets, the batch of a device, and how the command is started.
# A script sets `stage` and `run` (its name) and sources this file. `share_out_batch` and `need_data` check what it needs,
# and `launch` starts the command, whose flags and hyper-parameters stand in the script.
#
# Every value in capitals is a default: set the variable of that name to change it. Any flag of the trainer may follow
# the script's name; of two equal flags the last wins; `python patch_aligned/train_mem.py --help` lists them. Paths are
# relative to the root of the repository.
#
#   LLM=vicuna7b|vicuna13b|llama31   PROJECTOR=mlp|linear|cabstractor   rows of the paper's tables
#   GPU=80g|24g   NUM_GPUS=N   what it runs on; the global batch stays, gradient accumulation makes up the rest
#   NNODES=N NODE_RANK=I MASTER_ADDR=HOST   several machines: the same command on each, its own NODE_RANK; one shared disk
#   MASTER_PORT=N                                      a port of its own (default 29500) for each run on one machine
#   PRESET=mini                                        the miniature on CPU: small real weights, synthetic scenes
#   DRY_RUN=1                                          print the command, ready to paste, and stop

LLM=${LLM:-vicuna7b}
PROJECTOR=${PROJECTOR:-mlp}
GPU=${GPU:-80g}
PRESET=${PRESET:-full}
NNODES=${NNODES:-1}
DATA=${DATA:-./playground/data}

source scripts/launching.sh

# The largest batch per device and the DeepSpeed configuration. The 80g lines are LLaVA-1.5's own. The 24g lines are
# estimated from the sizes of weights and activations: set PER_DEVICE_TRAIN_BATCH_SIZE lower where they do not fit.
choose_memory() {
    case $stage:$LLM:$GPU in
        pretrain:*:80g)         batch_limit=32 zero=zero2 ;;
        pretrain:vicuna7b:24g)  batch_limit=8  zero=zero2 ;;
        pretrain:llama31:24g)   batch_limit=4  zero=zero2 ;;
        pretrain:vicuna13b:24g) batch_limit=4  zero=zero3 ;;
        finetune_qlora:*:80g)   batch_limit=16 zero=zero2 ;;  # ZeRO-3 cannot split weights of 4 bits
        finetune_qlora:*:24g)   batch_limit=4  zero=zero2 ;;
        finetune*:*:80g)        batch_limit=16 zero=zero3 ;;
        finetune_lora:*:24g)    batch_limit=4  zero=zero3 ;;
        finetune:*:24g)         batch_limit=4  zero=zero3_offload ;;
        *)                      die "unknown GPU=$GPU; choose 80g or 24g" ;;
    esac
}

preset_full() {
    case $LLM in
        vicuna7b)  known_llm=lmsys/vicuna-7b-v1.5;  family=llava-v1.5-7b ;;
        vicuna13b) known_llm=lmsys/vicuna-13b-v1.5; family=llava-v1.5-13b ;;
        llama31)
            # The paper says "Llama 3.1 8B"; Instruct is taken, as Vicuna is a chat model too.
            known_llm=meta-llama/Llama-3.1-8B-Instruct
            : "${VERSION:=llava_llama_3}"
            family=llava-v1.5-llama-3.1-8b
            ;;
        *)         die "unknown LLM=$LLM; choose vicuna7b, vicuna13b or llama31" ;;
    esac
    : "${MODEL_NAME_OR_PATH:=$known_llm}" "${VISION_TOWER:=openai/clip-vit-large-patch14-336}" "${NUM_GPUS:=$(count_gpus)}"
    if [ "${MODEL_NAME_OR_PATH##*/}" != "${known_llm##*/}" ] && { [ -z "${VERSION:-}" ] || [ -z "${OUTPUT_DIR:-}" ]; }; then
        die "MODEL_NAME_OR_PATH=$MODEL_NAME_OR_PATH is not LLM=$LLM ($known_llm): set VERSION, its template, and OUTPUT_DIR too"
    fi
    choose_memory
    device_flags=(--deepspeed "${DEEPSPEED:=./scripts/$zero.json}" --bf16 True --tf32 True)
}

# SmolLM2-135M and DINOv2-small at 112 px (64 visual tokens) in float32; DeepSpeed only if DEEPSPEED names a
# configuration. Its values replace those of the scripts.
preset_mini() {
    family=llava-mini
    batch_limit=8
    : "${MODEL_NAME_OR_PATH:=./playground/mini/cache/models/smollm2-135m-instruct}"
    : "${VISION_TOWER:=./playground/mini/cache/models/dinov2-small}"
    if [ "$stage" = pretrain ]; then
        : "${DATA_PATH:=$DATA/mini/train/train.json}" "${SAVE_STEPS:=25}" "${GLOBAL_BATCH_SIZE:=8}" "${MAX_STEPS:=50}"
    else
        # A few steps of 2e-5 would teach a model of this size next to nothing, and all weights take their time on a CPU.
        if [ "$stage" = finetune ]; then : "${LEARNING_RATE:=1e-4}"; fi
        : "${DATA_PATH:=$DATA/mini/train/instruct.json}" "${GLOBAL_BATCH_SIZE:=4}" "${MAX_STEPS:=40}"
    fi
    : "${IMAGE_FOLDER:=$DATA/mini/train}" "${PAD_PATH:=$DATA/mini/train/pad.json}" "${VERSION:=chatml_direct}"
    : "${NUM_GPUS:=1}" "${GRADIENT_CHECKPOINTING:=False}" "${DATALOADER_NUM_WORKERS:=0}" "${REPORT_TO:=none}"
    device_flags=(${DEEPSPEED:+--deepspeed "$DEEPSPEED"} --use_cpu True --bf16 False)
}

# Which stage 1 a finetuning starts from: the row of the table.
choose_stage1() {
    case ${STAGE1:-patchaligned} in
        patchaligned) run=-patchaligned$run;  made_by="bash scripts/v1_5/pretrain_patchaligned.sh" ;;
        captions)     made_by="bash scripts/v1_5/pretrain.sh" ;;
        *)            die "unknown STAGE1=$STAGE1; choose patchaligned or captions" ;;
    esac
    : "${PRETRAIN_MM_MLP_ADAPTER:=./checkpoints/$family$projector_suffix${run%-*lora}-pretrain/mm_projector.bin}"
    if [ "$PRESET" = mini ]; then made_by="PRESET=mini $made_by"; fi
    need "$PRETRAIN_MM_MLP_ADAPTER" "$made_by, or set PRETRAIN_MM_MLP_ADAPTER"
}

# nearest_divisor NUMBER WISH [at_most]: the divisor of NUMBER closest to WISH, the smaller of two at equal distance.
nearest_divisor() {
    local number=$1 wish=$2 distance
    for ((distance = 0; distance < number + wish; distance++)); do
        if ((wish > distance && number % (wish - distance) == 0)); then
            echo $((wish - distance))
            return
        elif [ -z "${3:-}" ] && ((number % (wish + distance) == 0)); then
            echo $((wish + distance))
            return
        fi
    done
}

# share_out_batch GLOBAL_BATCH_SIZE: devices * PER_DEVICE_TRAIN_BATCH_SIZE * accumulation is this number, or a refusal.
share_out_batch() {
    local devices=$((NNODES * NUM_GPUS)) share
    GLOBAL_BATCH_SIZE=$1
    need_number GLOBAL_BATCH_SIZE
    ((GLOBAL_BATCH_SIZE % devices == 0)) ||
        die "a global batch of $GLOBAL_BATCH_SIZE cannot be shared out among $devices devices; the nearest number that can: $(nearest_divisor "$GLOBAL_BATCH_SIZE" "$devices")"
    share=$((GLOBAL_BATCH_SIZE / devices))
    : "${PER_DEVICE_TRAIN_BATCH_SIZE:=$(nearest_divisor "$share" "$batch_limit" at_most)}"
    need_number PER_DEVICE_TRAIN_BATCH_SIZE
    ((share % PER_DEVICE_TRAIN_BATCH_SIZE == 0)) ||
        die "PER_DEVICE_TRAIN_BATCH_SIZE=$PER_DEVICE_TRAIN_BATCH_SIZE does not divide the $share samples that a device takes of a global batch of $GLOBAL_BATCH_SIZE; the nearest that does: $(nearest_divisor "$share" "$PER_DEVICE_TRAIN_BATCH_SIZE")"
    accumulation=$((share / PER_DEVICE_TRAIN_BATCH_SIZE))
}

# need_data FILE: makes the miniature's scenes with PRESET=mini, and refuses to start without FILE.
need_data() {
    if [ "$PRESET" = mini ] && [ -z "${DRY_RUN:-}" ]; then
        DATA=$DATA bash scripts/prepare_mini.sh
    fi
    need "$1" "bash scripts/prepare_data.sh --check"
}

# launch PROGRAM FLAGS...: starts one process per device, or prints the command.
launch() {
    local launcher word
    name_misspelt "$0" scripts/v1_5/common.sh
    if [ "$PRESET" = full ]; then need_gpu; fi
    if ((NNODES > 1)); then
        launcher=(torchrun --nnodes "$NNODES" --node_rank "${NODE_RANK:?set it to the rank of this machine, from 0}"
            --master_addr "${MASTER_ADDR:?set it to the address of the machine of rank 0}"
            --master_port "${MASTER_PORT:-29500}" --nproc_per_node "$NUM_GPUS")
    elif [ "$PRESET" = mini ] && ((NUM_GPUS == 1)); then
        launcher=(python)
    elif [ "$PRESET" = mini ]; then
        launcher=(torchrun ${MASTER_PORT:+--master_port "$MASTER_PORT"} --nproc_per_node "$NUM_GPUS")
    elif [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        launcher=(deepspeed --include "localhost:$CUDA_VISIBLE_DEVICES" ${MASTER_PORT:+--master_port "$MASTER_PORT"})
    else
        launcher=(deepspeed --num_gpus "$NUM_GPUS" ${MASTER_PORT:+--master_port "$MASTER_PORT"})
    fi
    if [ -z "${DRY_RUN:-}" ]; then
        supervise "${launcher[@]}" "$@"
    fi
    printf '%q ' "${launcher[@]}"
    printf '%q' "$1"
    for word in "${@:2}"; do
        case $word in
            --*) printf ' \\\n    %q' "$word" ;;
            *)   printf ' %q' "$word" ;;
        esac
    done
    echo
}

case $PROJECTOR in
    mlp)         MM_PROJECTOR_TYPE=${MM_PROJECTOR_TYPE:-mlp2x_gelu}; projector_suffix= ;;
    linear)      MM_PROJECTOR_TYPE=${MM_PROJECTOR_TYPE:-linear}; projector_suffix=-linear ;;
    cabstractor) MM_PROJECTOR_TYPE=${MM_PROJECTOR_TYPE:-cabstractor}; projector_suffix=-cabstractor ;;
    *)           die "unknown PROJECTOR=$PROJECTOR; choose mlp, linear or cabstractor" ;;
esac
case $PRESET in
    full) preset_full ;;
    mini) preset_mini ;;
    *)    die "unknown PRESET=$PRESET; choose full or mini" ;;
esac
need_number NNODES
need_number NUM_GPUS
need_own_packages
if [ "$stage" != pretrain ]; then choose_stage1; fi
: "${OUTPUT_DIR:=./checkpoints/$family$projector_suffix$run}"
