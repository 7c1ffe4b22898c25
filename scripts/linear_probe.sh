#!/usr/bin/env bash
# DATASET_PATH=/data/IN100 net_name=CLeVER backbone_name=vit_small GPU_num=4 GPU_num_LN=2 bash scripts/linear_probe.sh
#
# Trains a linear probe (eval_linear.py) on each of PARTS of a network from pretrain.sh, all with the same passes of the
# network. The output is appended to the log of each part.
# Set the same variables as for pretrain.sh: the folder of the run is named after them. DRY_RUN=1 only prints the commands.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

echo "linear probe: $PARTS of $net_name $backbone_name, $EPOCH_LN epochs of $DATASET_PATH," \
  "$GPU_num_LN x $BATCH_LN images, lr $lr, in $RUN_DIR"
check_probe
logs=()
for part in $PARTS; do
  logs+=("$RUN_DIR/result_$(linear_name "$part").txt")
done
eval_linear "$GPU_num_LN" "$(printf '%s\n' "${logs[@]}")"
