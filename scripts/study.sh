#!/usr/bin/env bash
# bash scripts/study.sh   (installs what is missing; takes hours on two cores, without a GPU)
#
# The equivariant methods of the field on one loop: how accurate they are, and what they know of transformations (docs/study.md).
# A cell is one network: a backbone pretrained by one of the NETS with one of the LAMBDAS, RECIPES and SEEDS, or untrained.
# Can be run again: finished steps are skipped, interrupted ones continue. A cell that fails does not stop the others.
#
#   TUNE=1                      to choose weights: FACTORS times the default, seed 0; cells are trained on the same images, and
#                               evaluated on further training images, never on the test images
#   ARCHS, RECIPES, SEEDS       lists of words, e.g. SEEDS="0 1 2 3 4"; default: resnet8, aug1_2, 1 2 3
#   NETS="dino augself+EF:0.3"  rows of METHODS below, with or without a weight
#   LAMBDAS="0.1 1"             weights of all NETS that have none: of the term, of CLeVER's EF loss
#   RECORDS=docs/study/records.json   cells in this file are not run again: compare a method of yours with the published ones
#   DATA=digits                 instead of fashion-mnist; or a folder of your own with train/ and val/ (TUNE=1: <folder>_tune)
#   MEAN, STD                   of the channels of your own images, for pixels in 0..1; default: ImageNet's
#   TOLD="crop color"           what methods are told of the views (--equiv_params)
#   FASHION_MNIST_DIR=...       the files of Fashion-MNIST; DOWNLOAD=1 downloads them there
#   RESULT=results/mine         folder of the results; default: results/study
#   EPOCHS=3 SIZE=16            epochs of pretraining (default: see the table below); side of the images, pixels
#   JOBS=4                      cells at once; default: one per GPU, without GPUs one per core
#   STEPS="pretrain knn"        only these steps of every cell
#   PRETRAIN_FLAGS, PROBE_FLAGS, KNN_FLAGS, EQUIVARIANCE_FLAGS   further flags of main_dino.py, eval_linear.py, ...
#   DRY_RUN=1                   only print the commands
# shellcheck disable=SC2046,SC2086,SC2317,SC2329  # lists such as SEEDS are split into words; the steps are run by their names
set -euo pipefail
set -f # without expanding * to file names
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/nets.sh
source scripts/nets.sh

# Chosen for dino on the tuning split, and shared by all.
# batch: images per step. lr: for 256 images per step. out_dim, hidden, bottleneck: widths of the heads. temp: of the teacher.
# crop: least share of the image in a view. wd: weight decay.
SETTINGS="
arch                    epochs warmup batch lr    wd    out_dim hidden bottleneck temp momentum crop patch probe_lr
resnet8                 8      2      64    0.016 0.001 256     256    64         0.02 0.98     0.7  16    0.3
vit_micro               8      2      64    0.001 0.001 256     256    64         0.02 0.98     0.7  4     1
vssm2-vmambav2_micro    8      2      64    0.016 0.001 256     256    64         0.02 0.99     0.7  16    1
"
# What is compared: nets; +EF: the term on the EF alone; +rotation, +grey: told this alone, +grey on grey images nothing; +2: two
# more views. With the default of the weight, and what was chosen with TUNE=1 (scripts/study.py); controls are not tuned.
METHODS="
net             default chosen
untrained
dino
dino+2
CLeVER          1       0.1,1
augself         1       3,10
augself+EF      1       1,10
augself+rotation -      1
essl            0.4     4
essl+EF         0.4     1.2,4
equimod         1       10
equimod+EF      1       10
equimod_pair    1       1
equimod_pair+EF 1       0.3,3
equimod_pair+grey -     1
sie             1       0,0.3,1
care            0.03    0.03,0.3
"
FACTORS="1 0.3 3 0.1 10"
PERTURBATIONS="ori basic aug1 aug1_2 aug1_4_2"
TRANSFORMS="rotation crop jitter blur flip solarize elastic" # without `grey`, which grey images do not show

# --- variables -------------------------------------------------------------------------------------------------------

stop() { echo "study: $*" >&2; exit 2; }
tell() { printf 'study, %d:%02d: %s\n' $((SECONDS / 3600)) $((SECONDS / 60 % 60)) "$*"; }

# column TABLE NAME NUMBER: a field of the row that begins with NAME. names TABLE: the first field of every row.
column() { awk -v name="$2" -v number="$3" '$1 == name { print $number }' <<< "$1"; }
names() { awk 'NF && $1 != "arch" && $1 != "net" { print $1 }' <<< "$1"; }

# check_words NAME CHOICE...: stop unless every word of the variable NAME is one of the choices, and there is one.
check_words() {
  local name=$1 word
  shift
  for word in ${!name:-none}; do [[ " $* " == *" $word "* ]] || stop "$name=${!name}: $word is not one of $*"; done
}

# weights_of NET: those of its cells; `-` for a network without a weight.
weights_of() {
  local default
  default=$(column "$METHODS" "$1" 2)
  if [[ ! $default ]]; then
    echo -
  elif [[ ${LAMBDAS:-} ]]; then
    echo $LAMBDAS
  elif [[ $TUNE == 1 && $default != - ]]; then
    awk -v default="$default" '{ for (i = 1; i <= NF; i++) printf "%g ", default * $i }' <<< "$FACTORS"
  else
    { column "$METHODS" "$1" 3 | grep . || echo "$default"; } | tr , ' ' # nothing was chosen: the default
  fi
}

: "${TUNE:=0}" "${ARCHS:=resnet8}"
if [[ $TUNE == 1 ]]; then : "${SEEDS:=0}" "${STEPS:=pretrain tune}"; fi
ALL_STEPS="pretrain tune probe perturbation knn equivariance"
: "${NETS:=$(names "$METHODS" | paste -sd' ' -)}" "${RECIPES:=aug1_2}" "${SEEDS:=1 2 3}" "${STEPS:=${ALL_STEPS/ tune/}}"
: "${DATA:=fashion-mnist}" "${TOLD:=crop rotation brightness contrast}" "${RECORDS:=}"
: "${PRETRAIN_FLAGS:=}" "${PROBE_FLAGS:=}" "${KNN_FLAGS:=}" "${EQUIVARIANCE_FLAGS:=}"
check_words ARCHS $(names "$SETTINGS")
check_words RECIPES aug1 aug1_2 aug1_4_2
check_words STEPS $ALL_STEPS
[[ $SEEDS =~ ^\ *((0|[1-9][0-9]{0,8})(\ +|$))+$ ]] || stop "SEEDS=$SEEDS: must be whole numbers such as 0 1 2"
[[ ! $RECORDS || -f $RECORDS ]] || stop "RECORDS=$RECORDS: no such file"
: "${RESULT:=results/study}"
case $DATA in
  digits)
    data=data/digits
    : "${SIZE:=16}" "${MEAN:=0.305 0.305 0.305}" "${STD:=0.376 0.376 0.376}"
    images=(digits)
    ;;
  fashion-mnist)
    data=data/fashion-mnist-10000
    : "${MEAN:=0.286 0.286 0.286}" "${STD:=0.353 0.353 0.353}"
    package=/usr/share/datasets/fashion-mnist # Debian: apt install dataset-fashion-mnist
    [[ -n ${FASHION_MNIST_DIR:-} || ! -d $package ]] || FASHION_MNIST_DIR=$package
    : "${FASHION_MNIST_DIR:=data/torchvision}"
    images=(fashion-mnist --source "$FASHION_MNIST_DIR" --train 10000 --val 10000)
    [[ ${DOWNLOAD:-0} != 1 ]] || images+=(--download)
    ;;
  *)
    data=$DATA images=()
    [[ -d $DATA/train && -d $DATA/val ]] || stop "DATA=$DATA: must be digits, fashion-mnist, or a folder with train/ and val/"
    [[ $STEPS != *tune* || -d ${DATA}_tune/val ]] ||
      stop "TUNE=1: ${DATA}_tune/train and val, parts of your training images, are missing"
    ;;
esac
: "${SIZE:=16}" "${MEAN:=0.485 0.456 0.406}" "${STD:=0.229 0.224 0.225}"
gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null | paste -sd, -) || gpus=""
IFS=, read -ra devices <<< "${CUDA_VISIBLE_DEVICES-$gpus}"
cores=$(env -u OMP_NUM_THREADS nproc 2> /dev/null || getconf _NPROCESSORS_ONLN) # nproc obeys OMP_NUM_THREADS
: "${JOBS:=$((${#devices[@]} > 0 ? ${#devices[@]} : cores))}"
for name in EPOCHS SIZE JOBS; do
  [[ ${!name-1} =~ ^[1-9][0-9]*$ ]] || stop "$name=${!name}: must be a whole number, 1 or more"
done

# --- one cell --------------------------------------------------------------------------------------------------------

# choose_cell ARCH RECIPE NET WEIGHT SEED: set the variables that the functions below use. The recipe of `untrained` is `-`.
choose_cell() {
  arch=$1 recipe=$2 net=$3 lambd=$4 seed=$5
  read -r epochs warmup batch lr wd out_dim hidden bottleneck temp momentum crop patch probe_lr \
    <<< "$(awk -v arch="$arch" '$1 == arch { $1 = ""; print }' <<< "$SETTINGS")"
  epochs=${EPOCHS:-$epochs}
  ((warmup <= epochs)) || warmup=$epochs
  name=${net/+/-}
  [[ $lambd == - ]] || name+=-$lambd
  folder=$RESULT/${arch}_${recipe}_${name}_seed$seed
  [[ $net != untrained ]] || epochs=0 folder=$RESULT/${arch}_untrained_seed$seed
  method="--net ${net%%+*}"
  case $net in
    untrained) method="--net CLeVER" ;; # its backbone, all that is used, is that of every net
    CLeVER) method+=" --sep_lambd $lambd" ;;
    dino+*) method+=" --local_crops_number ${net#*+} --local_crops_size $SIZE --local_crops_scale $crop 1" ;;
    dino) ;;
    *)
      method+=" --equiv_lambd $lambd"
      [[ $net != *+EF ]] || method+=" --equiv_part EF"
      if [[ $net == *+EF || $net != *+* ]]; then told=$TOLD; else told=${net#*+}; fi
      [[ " $TOLD_NETS " != *" ${net%%+*} "* ]] || method+=" --equiv_params $told"
      ;;
  esac
  parts=$(parts_of "${net%%+*}" "$method $PRETRAIN_FLAGS")
}

# settings: print what the results of the cell depend on, a name and its value per line.
settings() {
  local name
  for name in arch recipe net lambd seed data SIZE MEAN STD TOLD epochs warmup batch lr wd out_dim hidden bottleneck temp \
    momentum crop patch probe_lr PRETRAIN_FLAGS PROBE_FLAGS KNN_FLAGS EQUIVARIANCE_FLAGS; do
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
  local recipe=${recipe/#-/aug1_2} # untrained: no matter which
  # With little data, the loss leaves its plateau at ln(out_dim) only with batch norm in narrow heads, a sharp teacher that
  # follows quickly, and similar views. No local views: they take too much time.
  run main_dino.py --arch "$arch" --patch_size "$patch" --aug "$recipe" --epochs "$epochs" --seed "$seed" \
    --data_path "$data/train" --mean $MEAN --std $STD --output_dir "$folder" --saveckp_freq 0 --batch_size_per_gpu "$batch" \
    --lr "$lr" --min_lr 1e-5 --warmup_epochs "$warmup" --weight_decay "$wd" --weight_decay_end "$wd" \
    --use_bn_in_head true --out_dim "$out_dim" --head_hidden_dim "$hidden" --head_bottleneck_dim "$bottleneck" \
    --hp1 0.8 --reg_lambd _reg0.001 --DVR_out_dim "$out_dim" \
    --teacher_temp "$temp" --warmup_teacher_temp "$temp" --momentum_teacher "$momentum" --freeze_last_layer 0 \
    --global_crops_size "$SIZE" --global_crops_scale "$crop" 1 --local_crops_number 0 --use_fp16 false $method $PRETRAIN_FLAGS
}

# evaluate SCRIPT DATA OUT FLAG...: one of the scripts of evaluation on the network of the cell.
evaluate() { run "$1" --pretrained_weights "$folder/checkpoint.pth" --data_path "$2" --output_dir "$3" "${@:4}"; }

knn_on() { evaluate eval_knn.py "$1" "$2" --else_part $parts --nb_knn 20 --test_aug_type "${@:3}" $KNN_FLAGS; }

equivariance_on() { # a cell of its own shows the untrained network; dino's --hp1: the number of random dimensions
  evaluate eval_equivariance.py "$1" "$2" --hp1 0.8 --untrained false --transforms "${@:3}" --num_images 2000 \
    --views_per_image 4 --seed "$seed" $EQUIVARIANCE_FLAGS
}

tune() { knn_on "${data}_tune" "$folder/tune" ori aug1_2 && equivariance_on "${data}_tune" "$folder/tune" rotation crop jitter; }

probe() {
  evaluate eval_linear.py "$data" "$folder" --else_part $parts --epochs 10 --val_freq 10 --batch_size_per_gpu 64 \
    --lr "$probe_lr" --seed "$seed" $PROBE_FLAGS "$@"
}

perturbation() { probe --evaluate --test_aug_type $PERTURBATIONS; }

knn() { knn_on "$data" "$folder" $PERTURBATIONS; }

equivariance() { equivariance_on "$data" "$folder" $TRANSFORMS; }

is_complete() {
  for step in $STEPS; do [[ -e $folder/$step.done ]] || return 1; done
}

# run_cell: run the steps that are not done yet, until one fails.
run_cell() {
  local step
  mkdir -p "$folder" && settings > "$folder/settings.txt" || return
  [[ -e $folder/checkpoint.pth ]] || rm -f "$folder/pretrain.done" # the records say what the cell's other steps found
  for step in $ALL_STEPS; do # in this order, whatever the order of STEPS
    [[ " $STEPS " == *" $step "* && ! -e $folder/$step.done ]] || continue
    echo "=== $step, $(date '+%F %T')"
    "$step" && touch "$folder/$step.done" || return
  done
}

# --- all cells -------------------------------------------------------------------------------------------------------

# list_cells: a line ARCH RECIPE NET WEIGHT SEED for each. The seed is not the innermost loop: a study that is stopped early has
# compared the nets.
list_cells() {
  local seed arch recipe word net weight known
  known=$(names "$METHODS" | paste -sd' ' -)
  for seed in $SEEDS; do
    for arch in $ARCHS; do
      for recipe in $RECIPES; do
        for word in $NETS; do
          net=${word%%:*}
          [[ " $known " == *" $net "* ]] || stop "NETS=$NETS: $net is not one of $known"
          for weight in $(if [[ $word == *:* ]]; then echo "${word#*:}"; else weights_of "$net"; fi); do
            [[ $weight =~ ^(-|[0-9]*\.?[0-9]+)$ ]] || stop "$word: the weight $weight is not a number such as 0.3"
            echo "$arch ${recipe} $net $weight $seed"
          done
        done
      done
    done
  done | awk '$3 == "untrained" { $2 = "-" } !seen[$0]++'
}
listed=$(list_cells) || exit
readarray -t cells <<< "$listed"

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
[[ ! ${images[*]-} ]] || python -m scripts.data.make_small_data "${images[@]}" --out "$data" --tune "${data}_tune"
mkdir -p "$RESULT"
if command -v flock > /dev/null; then # the lock is held until the last process of a former study has ended, too
  exec 9> "$RESULT/.lock"
  flock -n 9 || stop "another study is running in $RESULT"
fi

[[ ! $RECORDS ]] || python -m scripts.study "$RECORDS" "$RESULT"
select_cells

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
