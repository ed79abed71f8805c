"""What a run keeps of itself: the content of its checkpoints, and how a new process continues from it."""

from itertools import islice

import torch

from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.small.filters import kept_filters
from utils.train.distributed import gather, rank, world_size


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
        "test_hits": trainer.hits,
        "pieces": trainer.pieces,
        "arithmetics": trainer.arithmetics,
        "cost": trainer.cost,
        "shapes": trainer.shapes,
        "numbering": trainer.numbering,
        "kept": trainer.present(),  # what the network still has, zeros included
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
        saved = saved if continues else for_new_run(saved, trainer.net, trainer.optimizer)
        restore_optimizer(trainer.optimizer, saved, path)
    if not continues:
        return
    trainer.epochs_done = checkpoint.get("epoch", 0)
    if "settings" not in checkpoint:
        return
    trainer.history.extend(checkpoint["history"])
    trainer.best = checkpoint["best_prec1"]
    trainer.hits = checkpoint.get("test_hits")
    trainer.pieces = checkpoint["pieces"] + 1
    trainer.arithmetics = list(dict.fromkeys([*checkpoint["arithmetics"], *trainer.arithmetics]))
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


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict, path: str) -> None:
    """Takes momentum and x_{t-1} from a saved optimizer; options (learning rate, HTrate, ...) stay those of this run.

    Raises:
        UserError: the saved optimizer is of other parameters.
    """
    saved = _prev_data_in_state(saved)
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(saved)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the optimizer saved in '{path}' does not fit this run ({error}); a run with adapters needs its --teacher"
        ) from None
    for group, own in zip(optimizer.param_groups, options, strict=True):
        params = group["params"]
        group.clear()
        group.update(own, params=params)
    regrows = any(group.get("regrow") and group["HTrate"] < 1 for group in optimizer.param_groups)
    names = ("momentum_buffer", "prev_data") if regrows else ("momentum_buffer", "prev_data", "kept")
    for p, state in optimizer.state.items():
        for name, value in list(state.items()):
            if name not in names or not isinstance(value, torch.Tensor):
                # Of another optimizer, or filters that may come back now.
                del state[name]
            elif value.shape != p.shape and not (name == "kept" and value.numel() == len(p) == len(value)):
                raise UserError(
                    f"'{name}' saved in '{path}' has shape {tuple(value.shape)}, its parameter {tuple(p.shape)}"
                )
            elif name != "kept":
                # In the parameter's memory layout, or every step would take the slow path.
                state[name] = torch.empty_like(p, requires_grad=False).copy_(value)


def for_new_run(saved: dict, net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """A saved optimizer for another run of the same network: what it holds beyond the network's parameters, the
    adapters of a distilled run, is left out, and this run's adapters begin without a state.
    """
    saved, count = _prev_data_in_state(saved), len(list(net.parameters()))
    keys = [key for group in saved["param_groups"] for key in group.get("params", [])][:count]
    state = {key: value for key, value in saved["state"].items() if key in keys}
    keys += [f"new {i}" for i in range(sum(len(group["params"]) for group in optimizer.param_groups) - count)]
    left = iter(keys)
    groups = [{"params": list(islice(left, len(group["params"])))} for group in optimizer.param_groups]
    return {"param_groups": groups, "state": state}


def _prev_data_in_state(saved: dict) -> dict:
    """AHSG-HT's release kept prev_data as a list in each parameter group; here it is per-parameter state."""
    groups, state = [], {key: dict(value) for key, value in saved.get("state", {}).items() if isinstance(value, dict)}
    for group in saved.get("param_groups", []):
        group = dict(group)
        for key, prev in zip(group.get("params", []), group.pop("prev_data", []), strict=False):
            state.setdefault(key, {})["prev_data"] = prev
        groups.append(group)
    return {"state": state, "param_groups": groups}
