#!/usr/bin/env bash
# DATASET_PATH=/data/IN100 net_name=CLeVER backbone_name=vit_small GPU_num=4 GPU_num_LN=2 bash scripts/linear_probe.sh
#
# Trains the linear probes of a network that pretrain.sh made (eval_linear.py), one for each of PARTS.
# Give it pretrain.sh's variables: they make up the folder. DRY_RUN=1 only prints the commands.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

echo "linear probe: $PARTS of $net_name $backbone_name, $EPOCH_LN epochs of $DATASET_PATH," \
  "$GPU_num_LN x $BATCH_LN images, lr $lr, in $RUN_DIR"
check_probe
for part in $PARTS; do
  eval_linear "$GPU_num_LN" "$RUN_DIR/result_$(linear_name "$part").txt" "$part"
done
