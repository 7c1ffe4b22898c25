#!/usr/bin/env bash
# DATASET_PATH=/data/IN100 net_name=CLeVER backbone_name=vit_small GPU_num=4 bash scripts/perturbation.sh
#
# Measures the probes that linear_probe.sh trained on perturbed images: each of TEST_AUGS with each of PARTS.
# Give it linear_probe.sh's variables: they make up the names. DRY_RUN=1 only prints the commands.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

echo "perturbation: $TEST_AUGS on $PARTS of $net_name $backbone_name, $DATASET_PATH/val," \
  "$GPU_num_EVAL x $BATCH_LN images, in $RUN_DIR"
check_probe
for aug in $TEST_AUGS; do
  for part in $PARTS; do
    eval_linear "$GPU_num_EVAL" "$RUN_DIR/only_eval_${aug}_$(linear_name "$part").txt" "$part" \
      --evaluate --test_aug_type "$aug"
  done
done
