#!/usr/bin/env bash
# bash scripts/quickstart.sh   (sets up what is needed; then about ten minutes on two cores, no GPU)
#
# Pretrains dino and CLeVER on small real images, trains linear probes of all of the representation (ALL), its invariant
# part (IR) and its equivariant factor (EF), measures them on perturbed images, and prints one table. The row `random` is
# a network that was not pretrained, probed in the same way. Every step is one of the launch scripts with small settings.
# Safe to run again: what is finished is reused, what was interrupted continues.
#
#   QUICK=long            more epochs of pretraining
#   ARCH=vssm2-vmambav2_micro   a small VMamba; takes twice as long
#   ARCH=vit_micro        a small ViT instead of the small ResNet; slower, the finer the patches (PATCH=4; by default 8)
#   DATA=fashion-mnist    instead of the digits: FASHION_MNIST_DIR holds its files, or DOWNLOAD=1 fetches them there
#   SEED=1                another seed
#   RESULT=results/mine   where the results go; by default results/quickstart, with a seed results/quickstart_seed<SEED>
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

QUICK=${QUICK:-short} ARCH=${ARCH:-resnet8} DATA=${DATA:-digits}
RESULT=${RESULT:-results/quickstart${SEED:+_seed$SEED}} SEED=${SEED:-0}

stop() { echo "quickstart: $*" >&2; exit 2; }
step() { printf '\n=== quickstart, %d:%02d: %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

case $QUICK in
  short) epochs=30 ;;
  long) epochs=120 ;;
  *) stop "QUICK=$QUICK: must be short or long" ;;
esac
case $DATA in
  digits) size=16 images=(digits) ;;
  fashion-mnist)
    : "${FASHION_MNIST_DIR:=data/torchvision}"
    size=24 images=(fashion-mnist --source "$FASHION_MNIST_DIR" --train 2000 --val 1000)
    [[ ${DOWNLOAD:-0} != 1 ]] || images+=(--download)
    ;;
  *) stop "DATA=$DATA: must be digits or fashion-mnist" ;;
esac

rate=0.004
[[ $ARCH != resnet* ]] || rate=0.016 # batch norm bears, and needs, the higher one

# shellcheck source=scripts/setup.sh
source scripts/setup.sh
SECONDS=0

# Two processes on the CPU; on a machine with GPUs too, since the settings are made for it.
export CUDA_VISIBLE_DEVICES="" DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PORT_NUM=${PORT_NUM:-29517}
export DATASET=$DATA DATASET_PATH=data/$DATA Result_dir=$RESULT backbone_name=$ARCH PATCH=${PATCH:-8} AUG_TYPE=aug1_2
export GPU_num=2 BATCH=32 HP1=0.8 SEP_LAMBD=1.0 DVR_out_dim=256 reg=_reg0.001
# What a small network on little data needs to leave ln(out_dim): batch norm in narrow heads, a sharp teacher that
# follows quickly, a high rate, and views that are not too different. No local views: augmentation is half of the time.
export PRETRAIN_FLAGS="--out_dim 256 --use_bn_in_head true --head_hidden_dim 256 --head_bottleneck_dim 64
  --teacher_temp 0.02 --warmup_teacher_temp 0.02 --momentum_teacher 0.98 --freeze_last_layer 0
  --lr $rate --min_lr 1e-5 --warmup_epochs 3 --weight_decay 0.001 --weight_decay_end 0.001 --use_fp16 false
  --global_crops_size $size --global_crops_scale 0.7 1 --local_crops_number 0
  --num_workers 0 --seed $SEED"
export GPU_num_LN=1 GPU_num_EVAL=1 EPOCH_LN=20 BATCH_LN=64 lr=0.3 n_last_blocks=4
export PROBE_FLAGS="--val_freq 10 --num_workers 0 --seed $SEED"

# measure NET EPOCHS PART: the probe of one part of a network and its accuracy on perturbed images, in one process.
measure() {
  local row=$1
  [[ $2 != 0 ]] || row=random
  export net_name=$1 EPOCH=$2 PARTS=$3 LAUNCHER=python
  { bash scripts/linear_probe.sh && bash scripts/perturbation.sh; } 2>&1 | sed "s/^/[$row $3] /"
}

# both COMMAND -- COMMAND: side by side; fails if either does.
both() {
  local first=() second status=0
  while [[ $1 != -- ]]; do first+=("$1"); shift; done
  shift
  "${first[@]}" & second=$!
  ("$@") || status=$?
  wait "$second" || status=$?
  return "$status"
}

step "$DATA as an image folder"
python -m scripts.data.make_small_data "${images[@]}" --out "$DATASET_PATH"

step "the network before pretraining"
net_name=CLeVER EPOCH=0 GPU_num=1 LAUNCHER=python bash scripts/pretrain.sh
for net in dino CLeVER; do
  step "pretraining of $net, $epochs epochs on two processes"
  net_name=$net EPOCH=$epochs bash scripts/pretrain.sh
done

step "linear probes and perturbations"
both measure CLeVER 0 ALL -- measure dino "$epochs" ALL
both measure CLeVER "$epochs" ALL -- measure CLeVER "$epochs" main_part
measure CLeVER "$epochs" else_part

step "results: top-1 accuracy in percent; columns are perturbations of the test images, ori are the clean ones"
python -m scripts.results_table "$RESULT/${DATASET}_ep0" "$RESULT/${DATASET}_ep$epochs" --out "$RESULT"
printf '\nquickstart: %d minutes %d seconds after the set-up. Logs and checkpoints: %s\n' \
  $((SECONDS / 60)) $((SECONDS % 60)) "$RESULT"
