#!/usr/bin/env bash
# DATASET_PATH=/data/IN100 net_name=CLeVER backbone_name=vit_small GPU_num=4 bash scripts/perturbation.sh
#
# Evaluates the probes from linear_probe.sh on perturbed test images: each of TEST_AUGS with each of PARTS. Each perturbed image
# passes through the network once. The output is appended to the log of each evaluation.
# Set the same variables as for linear_probe.sh: files are named after them. DRY_RUN=1 only prints the commands.
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

echo "perturbation: $TEST_AUGS on $PARTS of $net_name $backbone_name, $DATASET_PATH/val," \
  "$GPU_num_EVAL x $BATCH_LN images, in $RUN_DIR"
check_probe
logs=()
for aug in $TEST_AUGS; do
  for part in $PARTS; do
    logs+=("$RUN_DIR/only_eval_${aug}_$(linear_name "$part").txt")
  done
done
# shellcheck disable=SC2086  # TEST_AUGS is several words
eval_linear "$GPU_num_EVAL" "$(printf '%s\n' "${logs[@]}")" --evaluate --test_aug_type $TEST_AUGS
