#!/bin/bash
# Makes runs that results/README.md lacks, the most useful first, AT_ONCE of them side by side (1):
#
#     R20=resnet20-12fca82f.th R56=resnet56-4bfd9763.th bash results/unfinished/queue.sh DATA [AT_ONCE]
#
# Run it in a clone of one commit. A run that was stopped continues, one that is finished is passed over. Ctrl-C stops
# all. On a CPU set OMP_NUM_THREADS=1 and AT_ONCE to the number of cores; --tf32 has no effect there.
export DATA=${1:?the path of CIFAR-10} R20=${R20:?the public ResNet-20} R56=${R56:?the public ResNet-56}

run() {
    local name=$1 folder=runs/$1
    shift
    [ -e "$folder.done" ] && return
    # The last --resume counts: a new run may begin with a trained network, a stopped one goes on.
    local latest=("$folder"/checkpoint.*)
    [ -e "${latest[0]}" ] && set -- "$@" --resume auto
    mkdir -p runs
    python cifar10_resnet_test.py "$DATA" --save_path "$folder" "$@" >> "$folder.log" 2>&1 && touch "$folder.done"
}
export -f run

# NAME FLAGS
sed "s|TRAINED|--recipe prune_gradual --resume $R20 --tf32|; s|TAUGHT|--teacher $R56|
    s|LONGER|--arch resnet56 --recipe prune_gradual --resume $R56 --macs_cut 0.53 --round_to 8 --tf32 --epochs 60|
    s|SMALL|results/from-random-200-epochs/C/small.resnet20.pth.tar|" <<'QUEUE' |
B-seed2 TRAINED --macs_cut 0.5 --epochs 60 --manualSeed 2 TAUGHT
B-seed3 TRAINED --macs_cut 0.5 --epochs 60 --manualSeed 3 TAUGHT
C-small --recipe baseline --widths_of SMALL -b 128 --lr_schedule cosine --lr 0.1 --warmup 1 --tf32 --epochs 200
D60-kd9-seed2 LONGER -b 256 --lr 0.1 --manualSeed 2 TAUGHT --kd logits:KL:9:T=2,standardise=1
D60-kd9-seed3 LONGER -b 256 --lr 0.1 --manualSeed 3 TAUGHT --kd logits:KL:9:T=2,standardise=1
QUEUE
    xargs -P "${2:-1}" -I{} bash -c 'run {}'
