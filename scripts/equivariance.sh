#!/usr/bin/env bash
# DATASET_PATH=/data/IN100 net_name=CLeVER backbone_name=vit_small GPU_num=4 bash scripts/equivariance.sh
#
# Measures what PARTS of a network from pretrain.sh know about the rotation, crop, colours, ... of an image
# (eval_equivariance.py). The output is appended to a log. Flags of eval_equivariance.py can be added, for example
# EQUIVARIANCE_FLAGS="--transforms rotation crop --head linear mlp".
# Set the same variables as for pretrain.sh: the folder of the run is named after them. DRY_RUN=1 only prints the command.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

echo "equivariance: $PARTS of $net_name $backbone_name, $DATASET_PATH, in $RUN_DIR"
check_probe
# shellcheck disable=SC2086  # PARTS and EQUIVARIANCE_FLAGS are several words
launch "$GPU_num_EVAL" "$RUN_DIR/result_equivariance_$TRIAL_name.txt" eval_equivariance.py \
  --pretrained_weights "$RUN_DIR/checkpoint.pth" --data_path "$DATASET_PATH" --output_dir "$RUN_DIR" \
  --trial_name "$TRIAL_name" --net "$net_name" --hp1 "$HP1" --arch "$backbone_name" --patch_size "$PATCH" \
  --parts $PARTS $EQUIVARIANCE_FLAGS
