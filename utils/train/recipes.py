"""The release's training recipes as numbers, and the learning-rate schedule that they share."""

from __future__ import annotations

import math

COMMON = dict(
    epochs=200,
    learning_rate=0.01,
    momentum=0.9,
    nesterov=True,
    decay=5e-4,
    schedule=[1, 60, 120, 160],
    gammas=[10.0, 0.2, 0.2, 0.2],
)
PRUNE = dict(batch_size=64, k=128, HTrate=0.7, v=0.1)
PLAIN = dict(batch_size=128, k=None, HTrate=1.0, v=0.0)

# distill and prune_distill need a teacher; finetune starts from a pruned checkpoint.
RECIPES: dict[str, dict] = {
    "baseline": {**COMMON, **PLAIN},
    "prune": {**COMMON, **PRUNE},
    "distill": {**COMMON, **PLAIN},
    "prune_distill": {
        **COMMON,
        **PRUNE,
        "epochs": 250,
        "schedule": [1, 60, 120, 160, 200],
        "gammas": [10.0, 0.2, 0.2, 0.2, 0.5],
    },
    "finetune": {**COMMON, **PRUNE, "learning_rate": 0.001},
}

# The recipe that papers on pruning train torchvision's ResNets by, soft filter pruning's among them.
IMAGENET_COMMON = dict(
    epochs=100,
    learning_rate=0.1,
    momentum=0.9,
    nesterov=False,
    decay=1e-4,
    schedule=[30, 60, 90],
    gammas=[0.1, 0.1, 0.1],
    batch_size=256,
    k=None,
)
IMAGENET_RECIPES: dict[str, dict] = {
    "baseline": {**IMAGENET_COMMON, "HTrate": 1.0, "v": 0.0},
    "prune": {**IMAGENET_COMMON, "HTrate": 0.7, "v": 0.1},
    "distill": {**IMAGENET_COMMON, "HTrate": 1.0, "v": 0.0},
    "prune_distill": {**IMAGENET_COMMON, "HTrate": 0.7, "v": 0.1},
    "finetune": {**IMAGENET_COMMON, "HTrate": 0.7, "v": 0.1, "learning_rate": 0.001},
}


def recipes_of(dataset: str) -> dict[str, dict]:
    """The recipes that a data set is trained by."""
    return IMAGENET_RECIPES if dataset == "imagenet" else RECIPES


def learning_rate_at(epoch: int, base: float, schedule: list[int], gammas: list[float]) -> float:
    """Learning rate of an epoch: base times every gamma whose milestone has been reached."""
    return base * math.prod(gamma for milestone, gamma in zip(schedule, gammas, strict=True) if epoch >= milestone)


def fit_schedule(schedule: list[int], epochs: int, full_epochs: int) -> list[int]:
    """Milestones of a recipe of `full_epochs`, scaled to `epochs`.

    Milestone 1, the end of the warm-up epoch, stays; the others keep at least an epoch between them, so a very short run ends
    before the last of them.
    """
    fitted: list[int] = []
    for milestone in schedule:
        scaled = milestone if milestone <= 1 else round(milestone * epochs / full_epochs)
        fitted.append(max(scaled, fitted[-1] + 1 if fitted else 0))
    return fitted
