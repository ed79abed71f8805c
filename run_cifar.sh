#!/usr/bin/env bash
# Trains one recipe on CIFAR, from a fresh clone on: makes the environment, finds or downloads the data, trains, compares.
#
#   bash run_cifar.sh                                     prune ResNet-20 by 30 % of its filters
#   bash run_cifar.sh baseline --arch resnet56            the unpruned network
#   bash run_cifar.sh prune_distill                       teacher, student, and the student without a teacher
#   bash run_cifar.sh prune --HTrate 0.6 --epochs 200     flags are those of cifar10_resnet_test.py
#
# Recipes: prune (default), baseline, distill, prune_distill, finetune.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source utils/environment.sh
choose_python requirements.txt
exec "$PYTHON" -m utils.run_recipe "$@"
