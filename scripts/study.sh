#!/usr/bin/env bash
# bash scripts/study.sh   (installs what is missing; STUDY=small takes about 110 minutes on two cores, without a GPU)
#
# Does CLeVER beat DINO on perturbed images, and what do its IR and EF hold? docs/study.md has the protocol and the results.
# A cell is one network: a backbone pretrained by one of the NETS with one of the RECIPES and one of the SEEDS, or the untrained
# backbone of a seed. Each goes through the ordinary scripts, then scripts/tables.py makes the tables and pictures.
# Can be run again: finished steps are skipped, interrupted ones continue. A cell that fails does not stop the others.
#
#   STUDY=full                  all three backbones instead of resnet8
#   TUNE=1                      the tuning split, for choosing settings: it has no test images
#   ARCHS, NETS, RECIPES, SEEDS lists of words, e.g. SEEDS="0 1 2 3 4"
#   DATA=digits                 instead of fashion-mnist; or a folder of your own with train/ and val/
#   MEAN, STD                   of the channels of your own images, for pixels in 0..1; default: ImageNet's
#   FASHION_MNIST_DIR=...       the files of Fashion-MNIST; DOWNLOAD=1 downloads them there
#   RESULT=results/mine         folder of the results; default: results/study, with TUNE=1 results/study_tune
#   EPOCHS=3 SIZE=24            epochs of pretraining (default: see the table below); side of the images, pixels
#   JOBS=4                      cells at once; default: one per GPU, without GPUs one per core
#   STEPS="pretrain knn"        only these steps of every cell
#   PRETRAIN_FLAGS, PROBE_FLAGS, KNN_FLAGS, EQUIVARIANCE_FLAGS   further flags of main_dino.py, eval_linear.py, ...
#   DRY_RUN=1                   only print the commands
# shellcheck disable=SC2046,SC2086,SC2329  # lists such as SEEDS are split into words; the steps are run by their names
set -euo pipefail
set -f # without expanding * to file names
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/nets.sh
source scripts/nets.sh

# Chosen for dino on the tuning split, and shared by CLeVER; sep, and the momentum of vit_micro, were chosen for CLeVER.
# batch: images per step. lr: for 256 images per step. out_dim, hidden, bottleneck: widths of the heads. temp: of the teacher.
# sep: CLeVER's sep_lambd. crop: least share of the image in a view. wd: weight decay.
SETTINGS="
arch                    epochs warmup batch lr    wd    out_dim hidden bottleneck temp momentum sep crop patch probe_lr
resnet8                 12     3      64    0.016 0.001 256     256    64         0.02 0.98     0.1 0.7  16    0.3
vit_micro               12     3      64    0.008 0.001 256     256    64         0.02 0.996    0.1 0.7  4     1
vssm2-vmambav2_micro    12     3      64    0.016 0.001 256     256    64         0.02 0.99     1.0 0.7  16    1
"
PERTURBATIONS="ori basic aug1 aug1_2 aug1_4_2"
ALL_STEPS="pretrain probe perturbation knn equivariance"

# --- variables -------------------------------------------------------------------------------------------------------

stop() { echo "study: $*" >&2; exit 2; }
tell() { printf 'study, %d:%02d: %s\n' $((SECONDS / 3600)) $((SECONDS / 60 % 60)) "$*"; }

# check_words NAME CHOICE...: stop unless every word of the variable NAME is one of the choices, and none is given twice.
check_words() {
  local name=$1 word seen=" "
  shift
  for word in ${!name}; do
    [[ " $* " == *" $word "* ]] || stop "$name=${!name}: $word is not one of $*"
    [[ $seen != *" $word "* ]] || stop "$name=${!name}: $word is given twice"
    seen+="$word "
  done
  [[ $seen != " " ]] || stop "$name=${!name}: must name at least one of $*"
}

archs=$(awk 'NF && $1 != "arch" { print $1 }' <<< "$SETTINGS")
: "${STUDY:=small}"
check_words STUDY small full
if [[ $STUDY == small ]]; then : "${ARCHS:=resnet8}"; else : "${ARCHS:=$archs}"; fi
: "${NETS:=dino CLeVER untrained}" "${RECIPES:=aug1 aug1_2}" "${SEEDS:=0 1 2}" "${STEPS:=$ALL_STEPS}"
: "${DATA:=fashion-mnist}" "${TUNE:=0}"
: "${PRETRAIN_FLAGS:=}" "${PROBE_FLAGS:=}" "${KNN_FLAGS:=}" "${EQUIVARIANCE_FLAGS:=}"
check_words ARCHS $archs
check_words NETS $ALL_NETS untrained
check_words RECIPES aug1 aug1_2 aug1_4_2
check_words STEPS $ALL_STEPS
check_words TUNE 0 1
[[ $SEEDS =~ ^\ *((0|[1-9][0-9]{0,8})(\ +|$))+$ ]] || stop "SEEDS=$SEEDS: must be whole numbers such as 0 1 2"
check_words SEEDS $SEEDS
if [[ $TUNE == 0 ]]; then suffix=""; else suffix=_tune; fi
: "${RESULT:=results/study$suffix}"
case $DATA in
  digits)
    data=data/digits$suffix
    : "${SIZE:=16}" "${MEAN:=0.305 0.305 0.305}" "${STD:=0.376 0.376 0.376}"
    images=(digits --out data/digits --tune data/digits_tune)
    ;;
  fashion-mnist)
    data=data/fashion-mnist-10000$suffix
    : "${MEAN:=0.286 0.286 0.286}" "${STD:=0.353 0.353 0.353}"
    package=/usr/share/datasets/fashion-mnist # Debian: apt install dataset-fashion-mnist
    [[ -n ${FASHION_MNIST_DIR:-} || ! -d $package ]] || FASHION_MNIST_DIR=$package
    : "${FASHION_MNIST_DIR:=data/torchvision}"
    images=(fashion-mnist --source "$FASHION_MNIST_DIR" --train 10000 --val 10000)
    images+=(--out data/fashion-mnist-10000 --tune data/fashion-mnist-10000_tune)
    [[ ${DOWNLOAD:-0} != 1 ]] || images+=(--download)
    ;;
  *)
    data=$DATA images=()
    [[ -d $DATA/train && -d $DATA/val ]] || stop "DATA=$DATA: must be digits, fashion-mnist, or a folder with train/ and val/"
    [[ $TUNE == 0 ]] || stop "TUNE=1 with DATA=$DATA: split your training images yourself, and give that folder as DATA"
    ;;
esac
: "${SIZE:=24}" "${MEAN:=0.485 0.456 0.406}" "${STD:=0.229 0.224 0.225}"
gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | paste -sd, -) || gpus=""
IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES-$gpus}"
cores=$(env -u OMP_NUM_THREADS nproc 2> /dev/null || getconf _NPROCESSORS_ONLN) # nproc obeys OMP_NUM_THREADS
: "${JOBS:=$((${#devices[@]} > 0 ? ${#devices[@]} : cores))}"
for name in EPOCHS SIZE JOBS; do
  [[ ${!name-1} =~ ^[1-9][0-9]*$ ]] || stop "$name=${!name}: must be a whole number, 1 or more"
done

# --- one cell --------------------------------------------------------------------------------------------------------

# choose_cell ARCH RECIPE NET SEED: set the variables that the functions below use. An untrained network has `-` as recipe.
choose_cell() {
  arch=$1 recipe=$2 net=$3 seed=$4 parts=$(parts_of "$3")
  read -r epochs warmup batch lr wd out_dim hidden bottleneck temp momentum sep crop patch probe_lr \
    <<< "$(awk -v arch="$arch" '$1 == arch { $1 = ""; print }' <<< "$SETTINGS")"
  epochs=${EPOCHS:-$epochs}
  folder=$RESULT/${arch}_${recipe}_${net}_seed$seed
  ((warmup <= epochs)) || warmup=$epochs
  [[ $net != untrained ]] || epochs=0 folder=$RESULT/${arch}_untrained_seed$seed parts=$(parts_of CLeVER)
}

# settings: print what the results of the cell depend on, a name and its value per line.
settings() {
  local name
  for name in arch recipe net seed data SIZE MEAN STD epochs warmup batch lr wd out_dim hidden bottleneck temp momentum sep crop \
    patch probe_lr PRETRAIN_FLAGS PROBE_FLAGS KNN_FLAGS EQUIVARIANCE_FLAGS; do
    printf '%s %s\n' "$name" "${!name}"
  done
}

run() {
  local command=(python "$@" --num_workers 0)
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

pretrain() {
  local recipe=$recipe network=$net
  [[ $net != untrained ]] || recipe=aug1_2 network=CLeVER # the backbone, all that is used, is the same with any of them
  # With little data, the loss leaves its plateau at ln(out_dim) only with batch norm in narrow heads, a sharp teacher that
  # follows quickly, and similar views. No local views: they take too much time.
  run main_dino.py --net "$network" --arch "$arch" --patch_size "$patch" --aug "$recipe" --epochs "$epochs" --seed "$seed" \
    --data_path "$data/train" --mean $MEAN --std $STD --output_dir "$folder" --saveckp_freq 0 --batch_size_per_gpu "$batch" \
    --lr "$lr" --min_lr 1e-5 --warmup_epochs "$warmup" --weight_decay "$wd" --weight_decay_end "$wd" \
    --use_bn_in_head true --out_dim "$out_dim" --head_hidden_dim "$hidden" --head_bottleneck_dim "$bottleneck" \
    --hp1 0.8 --sep_lambd "$sep" --reg_lambd _reg0.001 --DVR_out_dim "$out_dim" \
    --teacher_temp "$temp" --warmup_teacher_temp "$temp" --momentum_teacher "$momentum" --freeze_last_layer 0 \
    --global_crops_size "$SIZE" --global_crops_scale "$crop" 1 --local_crops_number 0 --use_fp16 false $PRETRAIN_FLAGS
}

probe() {
  run eval_linear.py --pretrained_weights "$folder/checkpoint.pth" --data_path "$data" --output_dir "$folder" \
    --else_part $parts --epochs 20 --val_freq 10 --batch_size_per_gpu 64 --lr "$probe_lr" --seed "$seed" $PROBE_FLAGS "$@"
}

perturbation() { probe --evaluate --test_aug_type $PERTURBATIONS --per_image true; }

knn() {
  run eval_knn.py --pretrained_weights "$folder/checkpoint.pth" --data_path "$data" --output_dir "$folder" \
    --else_part $parts --nb_knn 20 --test_aug_type $PERTURBATIONS --per_image true $KNN_FLAGS
}

equivariance() {
  [[ $net != untrained ]] || return 0 # it is a control in the results of every trained network
  local hp1=""
  [[ $parts != ALL ]] || hp1="--hp1 0.8" # the number of random dimensions; other checkpoints say how wide the EF is
  run eval_equivariance.py --pretrained_weights "$folder/checkpoint.pth" --data_path "$data" --output_dir "$folder" $hp1 \
    --transforms rotation crop jitter blur flip solarize --num_images 2000 --views_per_image 4 --seed "$seed" \
    $EQUIVARIANCE_FLAGS # no transformation `grey`, which grey images do not show
}

is_complete() {
  for step in $STEPS; do [[ -e $folder/$step.done ]] || return 1; done
}

# run_cell: run the steps that are not done yet, until one fails.
run_cell() {
  local step
  mkdir -p "$folder" && settings > "$folder/settings.txt" || return
  for step in $ALL_STEPS; do # in this order, whatever the order of STEPS
    [[ " $STEPS " == *" $step "* && ! -e $folder/$step.done ]] || continue
    echo "=== $step, $(date '+%F %T')"
    "$step" && touch "$folder/$step.done" || return
  done
}

# --- all cells -------------------------------------------------------------------------------------------------------

cells=() # ARCH RECIPE NET SEED
for arch in $ARCHS; do
  for seed in $SEEDS; do # not the innermost loop: a study that is stopped early has compared the nets
    for recipe in $RECIPES; do
      for net in $NETS; do [[ $net == untrained ]] || cells+=("$arch $recipe $net $seed"); done
    done
    [[ " $NETS " != *" untrained "* ]] || cells+=("$arch - untrained $seed")
  done
done

# select_cells: set `waiting` to the cells that are not complete. Stop if one was begun with other settings.
select_cells() {
  local cell changes
  waiting=()
  for cell in "${cells[@]}"; do
    choose_cell $cell
    if [[ -e $folder/settings.txt ]]; then
      changes=$(diff "$folder/settings.txt" <(settings)) ||
        stop "$folder was made with other settings than $(sed -n 's/^> //p' <<< "$changes" | paste -sd, -); set another RESULT"
    fi
    is_complete || waiting+=("$cell")
  done
}

# work NUMBER: run the waiting cells that no other worker has claimed, one after the other.
work() {
  local i ended outcome
  export OMP_NUM_THREADS=1
  ((${#devices[@]} == 0)) || export CUDA_VISIBLE_DEVICES=${devices[$1 % ${#devices[@]}]}
  for i in "${!waiting[@]}"; do
    mkdir "$claims/$i" 2> /dev/null || continue
    choose_cell ${waiting[i]}
    mkdir -p "$folder"
    outcome="done"
    run_cell >> "$folder/cell.log" 2>&1 || outcome=FAILED
    touch "$claims/$i/ended"
    ended=$(find "$claims" -name ended | wc -l)
    tell "$outcome $folder; $((${#cells[@]} - ${#waiting[@]} + ended)) of ${#cells[@]} cells, about" \
      "$((SECONDS * (${#waiting[@]} - ended) / ended / 60)) minutes left"
  done
}

# end_workers: end the processes of all workers; each worker has a process group of its own (set -m).
end_workers() {
  local worker
  for worker in ${workers[@]+"${workers[@]}"}; do kill -- "-$worker" 2> /dev/null || true; done
  rm -rf "$claims"
}

select_cells
if [[ ${DRY_RUN:-0} == 1 ]]; then
  for cell in "${cells[@]}"; do
    choose_cell $cell
    for step in $ALL_STEPS; do [[ " $STEPS " != *" $step "* ]] || "$step"; done
  done
  exit
fi

# shellcheck source=scripts/setup.sh
source scripts/setup.sh
[[ ! ${images[*]-} ]] || python -m scripts.data.make_small_data "${images[@]}"
mkdir -p "$RESULT"
if command -v flock > /dev/null; then # the lock is held until the last process of a former study has ended, too
  exec 9> "$RESULT/.lock"
  flock -n 9 || stop "another study is running in $RESULT"
fi

SECONDS=0 workers=() claims=$(mktemp -d)
trap end_workers EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
tell "${#waiting[@]} of ${#cells[@]} cells to run, $JOBS at once, on $data, into $RESULT"
set -m
for ((worker = 0; worker < JOBS; worker++)); do
  work "$worker" &
  workers+=($!)
done
set +m
wait
workers=()

select_cells
status=0
python -m scripts.tables "$RESULT" --out "$RESULT" || status=$?
for cell in ${waiting[@]+"${waiting[@]}"}; do
  choose_cell $cell
  tell "failed: $folder, see $folder/cell.log; the same command continues it" >&2
  status=1
done
exit "$status"
