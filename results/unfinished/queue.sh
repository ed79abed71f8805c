#!/bin/bash
# Makes the runs that results/README.md still lacks, the most important first, AT_ONCE of them side by side (1):
#
#     R20=resnet20-12fca82f.th R56=resnet56-4bfd9763.th bash results/unfinished/queue.sh DATA [AT_ONCE]
#
# Run it in a clone of one commit. A run that was stopped continues, one that is finished is passed over. To stop all:
# pkill xargs; pkill -TERM -f cifar10_resnet_test. On a CPU set OMP_NUM_THREADS=1 and AT_ONCE to the number of cores.
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

# NAME FLAGS. The teacher of seed 1 is computed once for all runs (--teacher_cache), and again for kd-mse10, which needs
# features too, unless the file has them. B takes the best loss so far.
SMALL="--recipe baseline --widths_of runs/scratch-gradual-seed1/small.resnet20.pth.tar"
SMALL+=" --batch_size 128 --lr_schedule cosine --learning_rate 0.1 --warmup 1"
sed "s|TRAINED|--recipe prune_gradual --resume $R20|; s|TAUGHT|--teacher $R56 --teacher_cache runs/teacher.db|
    s|SMALL|$SMALL|; s|PUBLIC56|$R56|" <<'QUEUE' |
kd-std9 TRAINED --macs_cut 0.52 --round_to 8 --epochs 10 TAUGHT --kd logits:KL:9:T=2,standardise=1 --ce_weight 0.5
kd-kl09-lr02 TRAINED --macs_cut 0.52 --round_to 8 --epochs 10 TAUGHT --kd logits:KL:0.9 --ce_weight 0.1 --learning_rate 0.02
kd-dkd02 TRAINED --macs_cut 0.52 --round_to 8 --epochs 10 TAUGHT --kd logits:DKD:0.2 --ce_weight 1
kd-dkd1 TRAINED --macs_cut 0.52 --round_to 8 --epochs 10 TAUGHT --kd logits:DKD:1 --ce_weight 1
kd-mse10 TRAINED --macs_cut 0.52 --round_to 8 --epochs 10 TAUGHT --kd feature:MSE:10 --ce_weight 1 --shrink off
B TRAINED --macs_cut 0.5 --epochs 60 TAUGHT --kd logits:KL:1:T=2,standardise=1 --ce_weight 0.5
one-shot-seed2 TRAINED --macs_cut 0.52 --epochs 10 --manualSeed 2
one-shot-seed3 TRAINED --macs_cut 0.52 --epochs 10 --manualSeed 3
gradual-seed2 TRAINED --macs_cut 0.52 --epochs 10 --manualSeed 2 --prune_begin 0.05 --prune_end 0.5
gradual-seed3 TRAINED --macs_cut 0.52 --epochs 10 --manualSeed 3 --prune_begin 0.05 --prune_end 0.5
scratch-gradual-seed1 --recipe prune_gradual --macs_cut 0.52 --round_to 8 --epochs 10 --manualSeed 1
scratch-initial-seed1 --recipe prune_gradual --macs_cut 0.52 --round_to 8 --epochs 10 --manualSeed 1 --prune_begin 0 --prune_end 0
scratch-small-seed1 SMALL --epochs 10 --manualSeed 1
scratch-gradual-seed2 --recipe prune_gradual --macs_cut 0.52 --round_to 8 --epochs 10 --manualSeed 2
scratch-initial-seed2 --recipe prune_gradual --macs_cut 0.52 --round_to 8 --epochs 10 --manualSeed 2 --prune_begin 0 --prune_end 0
scratch-small-seed2 SMALL --epochs 10 --manualSeed 2
scratch-gradual-seed3 --recipe prune_gradual --macs_cut 0.52 --round_to 8 --epochs 10 --manualSeed 3
scratch-initial-seed3 --recipe prune_gradual --macs_cut 0.52 --round_to 8 --epochs 10 --manualSeed 3 --prune_begin 0 --prune_end 0
scratch-small-seed3 SMALL --epochs 10 --manualSeed 3
gradual-30 --recipe prune_gradual --macs_cut 0.52 --round_to 8 --epochs 30
one-shot-30 TRAINED --macs_cut 0.52 --round_to 8 --epochs 30
late-30 TRAINED --macs_cut 0.52 --round_to 8 --epochs 30 --prune_begin 0.05 --prune_end 0.5
one-shot-30-seed2 TRAINED --macs_cut 0.52 --round_to 8 --epochs 30 --manualSeed 2
one-shot-30-seed3 TRAINED --macs_cut 0.52 --round_to 8 --epochs 30 --manualSeed 3
C --recipe prune_gradual --macs_cut 0.5 --round_to 8 --epochs 200
D --arch resnet56 --recipe prune_gradual --resume PUBLIC56 --macs_cut 0.53 --round_to 8 --epochs 40 TAUGHT
QUEUE
    xargs -P "${2:-1}" -I{} bash -c 'run {}'
