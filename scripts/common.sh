# source scripts/common.sh   (as the launch scripts do)
#
# Variables and functions of the launch scripts. All variables that have a default below can be set in the environment.
# shellcheck shell=bash
set -euo pipefail
set -f # lists such as PARTS or PRETRAIN_FLAGS are split into words, without expanding * to file names

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/nets.sh
source "$ROOT/scripts/nets.sh"

die() { echo "$(basename "$0"): $*" >&2; exit 2; }

# Network and data
: "${net_name:=CLeVER}" "${backbone_name:=vit_small}" "${PATCH:=16}"
: "${DATASET:=IN100}" "${DATASET_PATH:=$ROOT/data/$DATASET}" # the folder with train/ and val/
: "${Result_dir:=$ROOT/results}"
: "${AUG_TYPE:=aug1_2}" # aug1 (BAug), aug1_2 (CAug), aug1_4_2 (CAug+)

# Machine
: "${GPU_num:=4}" "${GPU_num_LN:=2}" "${GPU_num_EVAL:=1}" # processes: pretraining, probe, evaluation
for name in GPU_num GPU_num_LN GPU_num_EVAL; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name=${!name}: must be a number of processes, 1 or more"
done
DEVICES=${DEVICES-${CUDA_VISIBLE_DEVICES-0,1,2,3}}        # empty: CUDA_VISIBLE_DEVICES is not changed
: "${PORT_NUM:=29500}"                                    # a second run on the same machine needs another port
: "${LAUNCHER:=python -m torch.distributed.launch}"       # or torchrun; or python, for a single process

# Pretraining
: "${EPOCH:=200}" "${BATCH:=$((512 / GPU_num))}" # BATCH: images per GPU, 512 in total by default
: "${HP1:=0.8}" "${SEP_LAMBD:=1.0}" "${DVR_out_dim:=65536}"
reg=${reg-_reg0.001}    # empty: no regulariser
: "${PRETRAIN_FLAGS:=}" # additional flags of main_dino.py, e.g. "--out_dim 1024 --warmup_epochs 1"

# Linear probe and evaluation
: "${EPOCH_LN:=100}" "${BATCH_LN:=128}" "${lr:=0.001}" "${n_last_blocks:=4}"
: "${PARTS:=$(parts_of "$net_name" "$PRETRAIN_FLAGS")}"
: "${TEST_AUGS:=basic aug1 aug1_2 aug1_4_2}"
: "${PROBE_FLAGS:=}" # additional flags of eval_linear.py
: "${EQUIVARIANCE_FLAGS:=}" # additional flags of eval_equivariance.py

TRIAL_name=${net_name}_${backbone_name}_${BATCH}_${HP1}_${DVR_out_dim}_${SEP_LAMBD}${reg}
RUN_DIR=$Result_dir/${DATASET}_ep$EPOCH/${net_name}_$backbone_name/$AUG_TYPE/$BATCH/$HP1/$TRIAL_name

# launch N LOGS script.py args...: run the script in N processes. The output is shown and appended to each file of LOGS,
# one name per line. DRY_RUN=1 only prints the command and the names of the logs.
launch() {
  local processes=$1 names=$2 script=$3 log logs=() cores settings options=()
  shift 3
  while IFS= read -r log; do logs+=("$log"); done <<< "$names"
  if [[ $LAUNCHER != python ]]; then
    options=(--nproc_per_node="$processes" --master_port="$PORT_NUM")
  elif [[ $processes != 1 ]]; then
    die "LAUNCHER=python starts one process, not $processes; use torchrun or python -m torch.distributed.launch"
  fi
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  settings=(PYTHONUNBUFFERED=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > processes ? cores / processes : 1))}")
  [[ -z $DEVICES ]] || settings+=(CUDA_VISIBLE_DEVICES="$DEVICES")

  # shellcheck disable=SC2086  # LAUNCHER is several words
  set -- env "${settings[@]}" $LAUNCHER ${options[@]+"${options[@]}"} "$ROOT/$script" "$@"
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "$@"
    echo
    printf 'log: %s\n' "${logs[@]}"
  else
    [[ $LAUNCHER == python ]] || port_is_free ||
      die "PORT_NUM=$PORT_NUM is in use, perhaps by another run on this machine; set another PORT_NUM"
    for log in "${logs[@]}"; do mkdir -p "$(dirname "$log")"; done
    "$@" 2>&1 | tee -a "${logs[@]}"
  fi
}

# port_is_free: succeeds unless a process of this machine listens at PORT_NUM.
port_is_free() { ! (exec 3<> "/dev/tcp/127.0.0.1/$PORT_NUM") 2> /dev/null; }

# name_of KIND --flag=value ...: print the name of a probe's files (clever/evaluation/names.py); KIND is linear or downstream.
name_of() { "$(command -v python || command -v python3)" "$ROOT/clever/evaluation/names.py" "$@"; }

# linear_name PART: print the name of the files of this run's linear probe.
linear_name() {
  name_of linear --part="$1" --hp1="$HP1" --lr="$lr" --epochs="$EPOCH_LN" --trial_name="$TRIAL_name"
}

# check_probe: exit unless all PARTS are valid, and this run has been pretrained.
check_probe() {
  local part error
  for part in $PARTS; do
    error=$(linear_name "$part" 2>&1 > /dev/null) || die "PARTS: $error"
  done
  [[ ${DRY_RUN:-0} == 1 || -f $RUN_DIR/checkpoint.pth ]] ||
    die "no $RUN_DIR/checkpoint.pth: run scripts/pretrain.sh first, with the same variables (they make up that folder)"
}

# eval_linear N LOGS flags...: run eval_linear.py on all PARTS of this run's network, in N processes.
eval_linear() {
  local processes=$1 log_names=$2 dataset_type=""
  shift 2
  [[ $DATASET != Imagenet && $DATASET != IN100 ]] || dataset_type="--dataset_type $DATASET"
  # shellcheck disable=SC2086  # dataset_type, PARTS and PROBE_FLAGS are several words
  launch "$processes" "$log_names" eval_linear.py --pretrained_weights "$RUN_DIR/checkpoint.pth" \
    --data_path "$DATASET_PATH" $dataset_type --output_dir "$RUN_DIR" --trial_name "$TRIAL_name" --net "$net_name" \
    --hp1 "$HP1" --arch "$backbone_name" --patch_size "$PATCH" --lr "$lr" --epochs "$EPOCH_LN" \
    --batch_size_per_gpu "$BATCH_LN" --n_last_blocks "$n_last_blocks" --else_part $PARTS "$@" $PROBE_FLAGS
}

# If the active python has no torch, use the environment that setup.sh made.
if ! python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("torch") is None)' 2> /dev/null &&
  [[ -x $ROOT/.venv/bin/python ]]; then
  export PATH="$ROOT/.venv/bin:$PATH"
fi
