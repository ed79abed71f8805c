"""Training recipes as numbers, and the learning-rate schedules that they use."""

import math

COMMON = dict(
    epochs=200, learning_rate=0.01, momentum=0.9, nesterov=True, decay=5e-4,
    lr_schedule="steps", warmup=0.0, schedule=[1, 60, 120, 160], gammas=[10.0, 0.2, 0.2, 0.2],
    kd=["feature:MSE:1"], ce_weight=1.0, prune_begin=None, prune_end=None,
)  # fmt: skip
PRUNE = dict(batch_size=64, k=128, HTrate=0.7, v=0.1)
PLAIN = dict(batch_size=128, k=None, HTrate=1.0, v=0.0)
# This project's own. `trained` holds what differs where training starts from a trained network: there everything is
# removed before the first step, which in ten epochs was not told apart from gradual removal. The loss is among the best
# of those tried on CIFAR-10, and was 0.42 points ahead of none in 30 epochs (results/notes.md).
GRADUAL = dict(
    lr_schedule="cosine", learning_rate=0.1, warmup=1.0, HTrate=0.7, v=0.0, k=None, prune_begin=0.2, prune_end=0.6,
    kd=["logits:KL:1:T=2,standardise=1"], ce_weight=0.5,
    trained=dict(learning_rate=0.05, warmup=0.0, prune_begin=0.0, prune_end=0.0),
)  # fmt: skip

# The release's shell scripts. distill and prune_distill need a teacher; finetune starts from a pruned checkpoint.
LONGER = dict(epochs=250, schedule=[1, 60, 120, 160, 200], gammas=[10.0, 0.2, 0.2, 0.2, 0.5])
RECIPES: dict[str, dict] = {
    "baseline": {**COMMON, **PLAIN},
    "prune": {**COMMON, **PRUNE},
    "distill": {**COMMON, **PLAIN},
    "prune_distill": {**COMMON, **PRUNE, **LONGER},
    "finetune": {**COMMON, **PRUNE, "learning_rate": 0.001},
    "prune_gradual": {**COMMON, **GRADUAL, "batch_size": 128},
}

# The recipe that papers on pruning train torchvision's ResNets by, soft filter pruning's among them.
IMAGENET = dict(
    COMMON, epochs=100, learning_rate=0.1, nesterov=False, decay=1e-4, schedule=[30, 60, 90], gammas=[0.1, 0.1, 0.1],
    batch_size=256, k=None, HTrate=1.0, v=0.0,
)  # fmt: skip
IMAGENET_RECIPES: dict[str, dict] = {
    "baseline": IMAGENET,
    "prune": {**IMAGENET, "HTrate": 0.7, "v": 0.1},
    "distill": IMAGENET,
    "prune_distill": {**IMAGENET, "HTrate": 0.7, "v": 0.1},
    "finetune": {**IMAGENET, "HTrate": 0.7, "v": 0.1, "learning_rate": 0.001},
    "prune_gradual": {**IMAGENET, **GRADUAL, "trained": dict(GRADUAL["trained"], learning_rate=0.01)},
}
# Recipes that start from trained weights: a file of another project is their starting point, not a run to continue.
START_TRAINED = ("finetune", "prune_gradual")


def recipes_of(dataset: str) -> dict[str, dict]:
    """The recipes that a data set is trained by."""
    return IMAGENET_RECIPES if dataset == "imagenet" else RECIPES


def learning_rate_at(epoch: float, settings: dict) -> float:
    """Learning rate at a time in epochs: a whole number for the schedule in steps, a fraction for cosine.

    Args:
        settings: learning_rate, lr_schedule, epochs, warmup, schedule, gammas.
    """
    base = settings["learning_rate"]
    if settings["lr_schedule"] == "steps":
        steps = zip(settings["schedule"], settings["gammas"], strict=True)
        return base * math.prod(gamma for milestone, gamma in steps if int(epoch) >= milestone)
    warmup = min(settings["warmup"], settings["epochs"])
    if epoch < warmup:
        return base * epoch / warmup
    return base * (1 + math.cos(math.pi * (epoch - warmup) / max(settings["epochs"] - warmup, 1e-9))) / 2


def fit_schedule(schedule: list[int], epochs: int, full_epochs: int) -> list[int]:
    """Milestones of a recipe of `full_epochs`, scaled to `epochs`.

    Milestone 1, the end of the warm-up epoch, stays; the others keep at least an epoch between them, so a very short
    run ends before the last of them.
    """
    fitted: list[int] = []
    for milestone in schedule:
        scaled = milestone if milestone <= 1 else round(milestone * epochs / full_epochs)
        fitted.append(max(scaled, fitted[-1] + 1 if fitted else 0))
    return fitted
