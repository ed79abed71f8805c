"""Gradual pruning: what can be removed together, scores, how much of each layer, the schedule, cutting in training."""
