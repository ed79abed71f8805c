"""Benchmarks: the training loop, the optimizer's step, and the small network against the unpruned one."""
