"""Commands that start several runs: the recipes of run_cifar.sh, and tables of runs."""
