"""Momentum, x_{t-1} and removed filters of a checkpoint, also of AHSG-HT's release, for the optimizer of a run."""

import torch

from utils.base.errors import UserError


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


def without_adapters(saved: dict, net: torch.nn.Module) -> dict:
    """A saved optimizer less what it holds beyond the parameters of a network: the adapters of a distilled run."""
    left, groups = len(list(net.parameters())), []
    for group in saved.get("param_groups", []):
        params = group.get("params", [])[:left]
        left -= len(params)
        groups += [{**group, "params": params}] if params else []
    known = {key for group in groups for key in group["params"]}
    return {**saved, "param_groups": groups, "state": {k: v for k, v in saved.get("state", {}).items() if k in known}}


def _prev_data_in_state(saved: dict) -> dict:
    """AHSG-HT's release kept prev_data as a list in each parameter group; here it is per-parameter state."""
    groups, state = [], {key: dict(value) for key, value in saved.get("state", {}).items() if isinstance(value, dict)}
    for group in saved.get("param_groups", []):
        group = dict(group)
        for key, prev in zip(group.get("params", []), group.pop("prev_data", []), strict=False):
            state.setdefault(key, {})["prev_data"] = prev
        groups.append(group)
    return {"state": state, "param_groups": groups}
