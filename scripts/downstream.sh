#!/usr/bin/env bash
# DATA_ROOT=/data net_name=CLeVER backbone_name=vit_small GPU_num=4 bash scripts/downstream.sh
#
# Downstream classification (eval_linear_ds.py) with a network from pretrain.sh: linear and ds_ft on CUB200, Flowers102,
# Food101 and OxfordIIITPet, semi_1 and semi_10 on the pretraining data, each with ALL and main_part.
# Set the same variables as for pretrain.sh: the folder of the run is named after them. DRY_RUN=1 only prints the commands.
set -euo pipefail
PARTS_DS=${PARTS:-} # read before common.sh sets the default of linear_probe.sh
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SETS=(CUB200 Flowers102 Food101 OxfordIIITPet)
: "${JOBS:=${SETS[*]/#/linear:} ${SETS[*]/#/ds_ft:} semi_1:$DATASET semi_10:$DATASET}" # mode:data
: "${DATA_ROOT:=$ROOT/data}"             # contains flowers-102/, food-101/ and oxford-iiit-pet/, in torchvision's layout
: "${CUB200_PATH:=$DATA_ROOT/CUB200}"    # contains train/ and val/ (scripts/data/make_cub200.py)
: "${SEMI_LISTS:=$DATASET_PATH}"         # contains ${DATASET}_1percent.txt and ${DATASET}_10percent.txt (make_semi_lists.py)
: "${GPU_num_DS:=1}" "${BATCH_DS:=256}" "${EPOCH_DS:=200}" "${lr_DS:=0.001}" "${lrbk_DS:=0.001}" "${WD_DS:=1e-4}"
: "${DS_FLAGS:=}" # additional flags of eval_linear_ds.py
PARTS=$(parts_of "$net_name" "$PRETRAIN_FLAGS")
PARTS=${PARTS_DS:-${PARTS% else_part}}

# downstream MODE DATA PART: run one job.
downstream() {
  local mode=$1 data=$2 part=$3 path=$DATA_ROOT lrbk=$lrbk_DS wd=$WD_DS type=(--dataset_type "$2") list=() name
  case $mode in
    linear) lrbk=0 wd=0 ;;
    ds_ft) ;;
    semi_1 | semi_10) list=(--semi_list "$SEMI_LISTS/${data}_${mode#semi_}percent.txt") ;;
    *) die "unknown mode $mode in JOBS; valid: linear ds_ft semi_1 semi_10" ;;
  esac
  case $data in
    CUB200) path=$CUB200_PATH ;;
    Flowers102 | Food101 | OxfordIIITPet) ;;
    "$DATASET") path=$DATASET_PATH; [[ $data == Imagenet || $data == IN100 ]] || type=() ;;
    *) die "unknown data $data in JOBS; valid: ${SETS[*]} $DATASET" ;;
  esac
  name=$(name_of downstream --mode="$mode" --data="$data" --part="$part" --hp1="$HP1" --trial_name="$TRIAL_name" \
    --lr="$lr_DS" --backbone_lr="$lrbk" --epochs="$EPOCH_DS" --batch_size="$BATCH_DS")
  # shellcheck disable=SC2086  # DS_FLAGS is split into words
  launch "$GPU_num_DS" "$RUN_DIR/ds/$name.txt" eval_linear_ds.py --ds_mode "$mode" ${type[@]+"${type[@]}"} \
    --data_path "$path" ${list[@]+"${list[@]}"} --pretrained_weights "$RUN_DIR/checkpoint.pth" \
    --output_dir "$RUN_DIR/ds/$name.pth.tar" --trial_name "$TRIAL_name" --net "$net_name" --hp1 "$HP1" \
    --arch "$backbone_name" --patch_size "$PATCH" --lr "$lr_DS" --backbone_lr "$lrbk" --weight_decay "$wd" \
    --epochs "$EPOCH_DS" --batch_size_per_gpu "$BATCH_DS" --n_last_blocks "$n_last_blocks" --else_part "$part" $DS_FLAGS
}

echo "downstream: $(wc -w <<< "$JOBS") jobs with $PARTS of $net_name $backbone_name, $EPOCH_DS epochs," \
  "$GPU_num_DS x $BATCH_DS images, lr $lr_DS, backbone $lrbk_DS, in $RUN_DIR/ds"
check_probe
for job in $JOBS; do
  for part in $PARTS; do
    downstream "${job%%:*}" "${job#*:}" "$part"
  done
done
