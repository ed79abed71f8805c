#!/usr/bin/env bash
# Trains one recipe on CIFAR, from a fresh clone on: makes the environment, finds or downloads the data, trains, compares.
#
#   bash run_cifar.sh                                     prune ResNet-20 by 30 % of its filters
#   bash run_cifar.sh baseline --arch resnet56            the unpruned network
#   bash run_cifar.sh prune_distill                       teacher, student, and the student without a teacher
#   bash run_cifar.sh prune DATA --HTrate 0.6             flags are those of cifar10_resnet_test.py; DATA comes first
#   bash run_cifar.sh table --seeds 1 2 3                 networks x rates x methods x seeds; see table --help
#
# Recipes: prune (default), baseline, distill, prune_distill, finetune, prune_gradual. Without DATA: ./data, or a download.
# A repeated command continues what was interrupted.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
source "$root/utils/environment.sh"
choose_python "$root/requirements.txt"
# Paths on the command line, ./data and runs/ are relative to where the command is given.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m utils.tables.recipe "$@"
