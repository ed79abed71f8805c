"""What a run keeps of itself: the content of its checkpoints, and how a new process takes it up again."""

from utils.base import checkpoint as checkpoints
from utils.small.filters import kept_filters
from utils.train.distributed import gather, rank, world_size
from utils.train.optimizer_state import restore_optimizer, without_adapters


def take(trainer) -> dict:
    """The keys of the release (epoch, arch, state_dict, best_prec1, optimizer), and what exact resumption needs.

    All ranks must call it together.
    """
    random_states, several = gather(checkpoints.random_states()), world_size() > 1
    buffers = gather({n: b.cpu() for n, b in trainer.net.named_buffers()}) if several and trainer.position else None
    return {
        "epoch": trainer.epochs_done,
        "arch": trainer.arch,
        "state_dict": trainer.net.state_dict(),
        "best_prec1": trainer.best,
        "optimizer": trainer.optimizer.state_dict(),
        "num_classes": len(trainer.images.classes),
        "dataset": trainer.args.dataset,
        **trainer.network_facts,
        "settings": vars(trainer.args),
        "history": trainer.history,
        "pieces": trainer.pieces,
        "cost": trainer.cost,
        "shapes": trainer.shapes,
        "numbering": trainer.numbering,
        "kept": trainer.present(),
        "random_states": random_states[0],
        **({"random_states_of_ranks": random_states} if several else {}),
        "loader": {"seed": trainer.train_loader.seed, "epoch": trainer.epochs_done, "position": trainer.position},
        # Within an epoch: the means so far, and each rank's BatchNorm statistics, averaged at the end of the epoch.
        **({"running_means": trainer.means.state_dict()} if trainer.position else {}),
        **({"batchnorm_of_ranks": buffers} if buffers else {}),
        # The student's weights stay deployable by themselves: what only training needs is kept apart.
        **({"adapters": trainer.adapters.state_dict()} if trainer.adapters is not None else {}),
        **({"pruning": trainer.pruning.state_dict()} if trainer.pruning is not None else {}),
    }


def restore(trainer, checkpoint: dict, path: str, *, continues: bool) -> None:
    """Takes weights and momentum from a checkpoint; a run that `continues` also epochs, metrics and random states.

    Raises:
        UserError: weights or optimizer are of another network.
    """
    checkpoints.load_weights(trainer.net, checkpoint["state_dict"], path)
    trainer.kept_at_start = kept_filters(trainer.net, getattr(trainer.optimizer, "additives", None))
    if trainer.adapters is not None and "adapters" in checkpoint:
        checkpoints.load_weights(trainer.adapters, checkpoint["adapters"], path)
    if "optimizer" in checkpoint:
        saved = checkpoint["optimizer"]
        restore_optimizer(trainer.optimizer, saved if continues else without_adapters(saved, trainer.net), path)
    if not continues:
        return
    trainer.epochs_done = checkpoint.get("epoch", 0)
    if "settings" not in checkpoint:
        return
    trainer.history.extend(checkpoint["history"])
    trainer.best = checkpoint["best_prec1"]
    trainer.pieces = checkpoint["pieces"] + 1
    trainer.train_loader.load_state_dict(checkpoint["loader"])
    trainer.position = checkpoint["loader"]["position"]
    trainer.saved_means = checkpoint["running_means"] if trainer.position else None
    trainer.saved = path, trainer.epochs_done, trainer.position
    buffers = checkpoint.get("batchnorm_of_ranks", [])
    if len(buffers) == world_size():
        for name, buffer in trainer.net.named_buffers():
            buffer.copy_(buffers[rank()][name])
    states = checkpoint.get("random_states_of_ranks", [checkpoint["random_states"]])
    if rank() == 0 or len(states) == world_size():
        checkpoints.restore_random_states(states[rank()])
    if len(states) != world_size():
        trainer.start.notes.append(
            f"note: '{path}' was written by {len(states)} processes, this run has {world_size()}: mini-batches and "
            "weights continue unchanged; BatchNorm's statistics and dropout depend on how a mini-batch is split"
        )
