#!/usr/bin/env bash
# DATASET_PATH=/data/IN100 net_name=CLeVER backbone_name=vit_small GPU_num=4 bash scripts/pretrain.sh
#
# Pretraining (main_dino.py). An interrupted run continues from its checkpoint. All variables: scripts/common.sh.
# DRY_RUN=1 only prints the command.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

echo "pretrain: $net_name $backbone_name, $AUG_TYPE, $EPOCH epochs of $DATASET_PATH/train," \
  "$GPU_num x $BATCH images, hp1 $HP1, sep_lambd $SEP_LAMBD, reg '$reg', into $RUN_DIR"
# shellcheck disable=SC2086  # PRETRAIN_FLAGS is split into words
launch "$GPU_num" "$RUN_DIR/result_pretrain_$TRIAL_name.txt" main_dino.py \
  --net "$net_name" --arch "$backbone_name" --patch_size "$PATCH" --aug "$AUG_TYPE" --hp1 "$HP1" \
  --sep_lambd "$SEP_LAMBD" --reg_lambd "$reg" --DVR_out_dim "$DVR_out_dim" \
  --epochs "$EPOCH" --batch_size_per_gpu "$BATCH" --saveckp_freq 100 \
  --data_path "$DATASET_PATH/train" --output_dir "$RUN_DIR" $PRETRAIN_FLAGS
