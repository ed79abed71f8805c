"""Benchmarks: the training loop, the optimizer, latency of small networks."""
