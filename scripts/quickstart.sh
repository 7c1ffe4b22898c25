#!/usr/bin/env bash
# bash scripts/quickstart.sh   (installs what is missing, then takes about four minutes on two cores, without a GPU)
#
# Pretrains each of NETS on small real images, trains linear probes on the whole representation (ALL), the invariant
# representation (IR) and the equivariant factor (EF), evaluates them on perturbed images, measures what rotation does to the
# features, and prints two tables. The row `untrained` is a network without pretraining, probed in the same way. Every step runs a
# launch script with small settings.
# Can be run again: finished steps are reused, interrupted ones continue.
#
#   NETS="dino CLeVER augself"  the networks, names of --net; default: dino CLeVER
#   QUICK=long                  four times as many epochs of pretraining
#   ARCH=vssm2-vmambav2_micro   a small VMamba instead of the small ResNet; takes about 6 minutes
#   ARCH=vit_micro              a small ViT; takes about 19 minutes. PATCH sets the side of its patches (default 4)
#   DATA=fashion-mnist          instead of the digits; FASHION_MNIST_DIR has its files, or DOWNLOAD=1 downloads them there
#   SEED=1                      another seed
#   RESULT=results/mine         folder of the results; default: results/quickstart, or results/quickstart_seed<SEED>
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/nets.sh
source scripts/nets.sh

NETS=${NETS:-dino CLeVER} QUICK=${QUICK:-short} ARCH=${ARCH:-resnet8} DATA=${DATA:-digits}
RESULT=${RESULT:-results/quickstart${SEED:+_seed$SEED}} SEED=${SEED:-0}

stop() { echo "quickstart: $*" >&2; exit 2; }
for net in $NETS; do [[ " $ALL_NETS " == *" $net "* ]] || stop "NETS=$NETS: $net is not one of $ALL_NETS"; done
step() { printf '\n=== quickstart, %d:%02d: %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$*"; }

case $DATA in
  digits) size=16 images=(digits) stats="--mean 0.305 0.305 0.305 --std 0.376 0.376 0.376" ;;
  fashion-mnist)
    : "${FASHION_MNIST_DIR:=data/torchvision}"
    size=24 images=(fashion-mnist --source "$FASHION_MNIST_DIR" --train 2000 --val 1000)
    stats="--mean 0.286 0.286 0.286 --std 0.353 0.353 0.353"
    [[ ${DOWNLOAD:-0} != 1 ]] || images+=(--download)
    ;;
  *) stop "DATA=$DATA: must be digits or fashion-mnist" ;;
esac
# Chosen for dino, sep_lambd and the momentum of a ViT for CLeVER, on a part of the training images (docs/pretraining.md, "Little
# data"). Networks that do not begin with a batch norm get the mean and the standard deviation of the images.
case $ARCH in
  vit*) epochs=100 warmup=10 rate=0.008 momentum=0.996 sep_lambd=0.1 probe_rate=1 ;;
  vssm*) epochs=40 warmup=4 rate=0.016 momentum=0.99 sep_lambd=1.0 probe_rate=1 ;;
  *) epochs=30 warmup=3 rate=0.016 momentum=0.98 sep_lambd=0.1 probe_rate=0.3 stats="" ;;
esac
case $QUICK in
  short) ;;
  long) epochs=$((4 * epochs)) ;;
  *) stop "QUICK=$QUICK: must be short or long" ;;
esac

# shellcheck source=scripts/setup.sh
source scripts/setup.sh
SECONDS=0

# On the CPU, even on a machine with GPUs: the settings are made for it. Each network has a process of its own.
export CUDA_VISIBLE_DEVICES="" DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export DATASET=$DATA DATASET_PATH=data/$DATA Result_dir=$RESULT backbone_name=$ARCH PATCH=${PATCH:-4} AUG_TYPE=aug1_2
export LAUNCHER=python GPU_num=1 BATCH=64 HP1=0.8 SEP_LAMBD=$sep_lambd DVR_out_dim=256 reg=_reg0.001
# With little data, the loss of a small network leaves its plateau at ln(out_dim) only with batch norm in narrow heads, a
# sharp teacher that follows quickly, a high learning rate, and similar views. No local views: they take too much time.
export PRETRAIN_FLAGS="--out_dim 256 --use_bn_in_head true --head_hidden_dim 256 --head_bottleneck_dim 64
  --teacher_temp 0.02 --warmup_teacher_temp 0.02 --momentum_teacher $momentum --freeze_last_layer 0
  --lr $rate --min_lr 1e-5 --warmup_epochs $warmup --weight_decay 0.001 --weight_decay_end 0.001 --use_fp16 false $stats
  --global_crops_size $size --global_crops_scale 0.7 1 --local_crops_number 0
  --num_workers 0 --seed $SEED"
export GPU_num_LN=1 GPU_num_EVAL=1 EPOCH_LN=20 BATCH_LN=64 lr=$probe_rate n_last_blocks=4
export PROBE_FLAGS="--val_freq 10 --crop_scale 0.6 1 --num_workers 0 --seed $SEED"
export EQUIVARIANCE_FLAGS="--transforms rotation --num_workers 0 --seed $SEED"

# pretrain NET: every line begins with the name of the network.
pretrain() { net_name=$1 EPOCH=$epochs bash scripts/pretrain.sh 2>&1 | sed "s/^/[$1] /"; }

# measure NET EPOCHS PARTS: train the probes of a network and evaluate them on perturbed images; then what rotation does.
measure() {
  local row=$1
  [[ $2 != 0 ]] || row=untrained
  export net_name=$1 EPOCH=$2 PARTS=$3
  { # the untrained network's rotation is measured beside those of the others
    bash scripts/linear_probe.sh && bash scripts/perturbation.sh && { [[ $row == untrained ]] || bash scripts/equivariance.sh; }
  } 2>&1 | sed "s/^/[$row] /"
}

# wait_for PID...: wait for background jobs; fails if one of them fails.
wait_for() {
  local job status=0
  for job in "$@"; do wait "$job" || status=$?; done
  return "$status"
}

step "$DATA as an image folder"
python -m scripts.data.make_small_data "${images[@]}" --out "$DATASET_PATH"

step "the network before pretraining"
net_name=CLeVER EPOCH=0 bash scripts/pretrain.sh

step "pretraining of $NETS at the same time, $epochs epochs"
jobs=()
for net in $NETS; do pretrain "$net" & jobs+=($!); done
wait_for "${jobs[@]}"

step "linear probes, perturbations, rotation"
measure CLeVER 0 ALL & jobs=($!)
for net in $NETS; do measure "$net" "$epochs" "$(parts_of "$net")" & jobs+=($!); done
wait_for "${jobs[@]}" # jobs of about the same length: at once, two cores are never idle

step "results: top-1 accuracy in percent on clean images (ori) and perturbed ones; then what rotation does to the features"
python -m scripts.tables "$RESULT/${DATASET}_ep0" "$RESULT/${DATASET}_ep$epochs" --out "$RESULT"
printf '\nquickstart: %d:%02d minutes after the installation. Logs and checkpoints: %s\n' \
  $((SECONDS / 60)) $((SECONDS % 60)) "$RESULT"
