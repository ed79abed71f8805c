"""Benchmarks: training loops, the optimizer's step, the cuts, small networks, torchvision's networks, a GPU."""
