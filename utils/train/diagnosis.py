"""Numbers that are not finite, and filters that leave the plan: noticed without waiting for the device, explained by repetition.

The training loop counts on the device which mini-batch first had a loss that is not finite. `Watch` reads that where the log reads
the means anyway, and keeps a copy of the state in which everything was still in order. When something is wrong the mini-batches since
then are repeated with hooks on every layer: the repetition is exact, so it comes to the same mini-batch, and shows where it began.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.small.filters import check_plan, kept_filters
from utils.train.distributed import gather
from utils.train.engine import RunningMeans, to_device, train_step

# Mini-batches between two copies of the state, so that no more have to be repeated.
COPY_EVERY = 100


class Watch:
    """Looks after one training; see the module's text.

    Args:
        training: utils.train.trainer.Training; its network, optimizer, loader and objective are used, its files are not.
    """

    def __init__(self, training):
        self.training = training
        self.epoch, self.steps, self._at, self._state = 0, 0, 0, None

    def begin(self, epoch: int, first: int) -> None:
        """An epoch begins, or goes on, at mini-batch `first`."""
        self.epoch, self.steps = epoch, len(self.training.train_loader.sizes(epoch))
        self._copy_state(first)

    def check(self, t: int, means: RunningMeans, *, thorough: bool) -> None:
        """Looks at what mini-batch t has left behind; waits for the device.

        Args:
            t: number of the mini-batch just done.
            means: of the epoch so far.
            thorough: weights and plan too, as before a checkpoint is written. Now and then they are in any case.

        Raises:
            UserError: the loss or a weight is not finite, or the kept filters break the plan.
        """
        thorough = thorough or t + 1 - self._at >= COPY_EVERY
        first_bad = int(means.first_bad)
        if first_bad < 0 and thorough and first_not_finite_tensor(self.training.tensors()) is not None:
            first_bad = t
        # What one rank notices all must: the repetition is a common one.
        noticed = [bad for bad in gather(first_bad) if bad >= 0]
        if noticed:
            raise UserError(self._explain_not_finite(min(noticed), t))
        if thorough:
            if any(gather(self._breaks_plan(t) is not None)):
                raise UserError(self._explain_plan(t))
            self._copy_state(t + 1)

    def _breaks_plan(self, t: int) -> str | None:
        training = self.training
        is_thresholded = training.args.threshold_every == "step" or t == self.steps - 1
        if not training.thresholds or not is_thresholded:
            return None
        try:
            check_plan(training.plan, kept_filters(training.net), training.start)
        except UserError as error:
            return str(error)
        return None

    def _copy_state(self, position: int) -> None:
        training = self.training
        self._at = position
        self._state = copy.deepcopy(
            {
                "net": training.net.state_dict(),
                "adapters": training.adapters.state_dict() if training.adapters is not None else {},
                "optimizer": training.optimizer.state_dict(),
                "random": checkpoints.random_states(),
            }
        )

    def _repeat(self, last: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Puts the state of the last copy back and gives the mini-batches (t, images, labels) from there up to `last`."""
        training, state = self.training, self._state
        training.net.load_state_dict(state["net"])
        if training.adapters is not None:
            training.adapters.load_state_dict(state["adapters"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.net.train()
        loader = training.train_loader
        loader.load_state_dict({"seed": loader.seed, "epoch": self.epoch, "position": self._at})
        # Last, as making the loader's iterator must not use up what dropout is to draw.
        for t, batch in enumerate(loader, start=self._at):
            if t == self._at:
                checkpoints.restore_random_states(state["random"])
            yield t, *to_device(*batch, training.device)
            if t == last:
                return

    def _step(self, t: int, images: Tensor, labels: Tensor, objective=None) -> None:
        training = self.training
        sizes = training.train_loader.sizes(self.epoch)
        train_step(
            training.net,
            images,
            labels,
            objective or training.objective,
            training.optimizer,
            RunningMeans(training.device),
            t=t,
            sizes=sizes,
            epoch=self.epoch,
            threshold_every=training.args.threshold_every,
            max_images=training.args.max_images_per_step,
        )

    def _explain_not_finite(self, suspect: int, last: int) -> str:
        """The line about mini-batch `suspect`, or one before it that a repetition up to `last` shows to be the first."""
        t, reason = suspect, "a repetition did not show it again, so its layer is not known"
        for number, images, labels in self._repeat(last):
            # The loss tells of weights that the mini-batch before has spoilt.
            if number < suspect - 1:
                self._step(number, images, labels)
                continue
            with observed(self.training, self.training.objective) as (objective, found):
                self._step(number, images, labels, objective)
            spoilt = first_not_finite_tensor(self.training.tensors())
            findings = gather(found[0] if found else spoilt and f"{spoilt} after the step")
            if any(findings):
                r, what = next((r, what) for r, what in enumerate(findings) if what)
                t, reason = number, f"first not finite: {what}" + (f" on rank {r}" if len(findings) > 1 else "")
                break
        return f"{self._where(t)}: {reason}; lower --learning_rate; {self.training.last_good()}"

    def _explain_plan(self, last: int) -> str:
        broken = t = None
        for t, images, labels in self._repeat(last):
            self._step(t, images, labels)
            broken = next((line for line in gather(self._breaks_plan(t)) if line), None)
            if broken is not None:
                break
        broken = broken or "the kept filters break the plan"
        return f"{self._where(last if t is None else t, 'filters')}: {broken}; {self.training.last_good()}"

    def _where(self, t: int, what: str = "numbers that are not finite") -> str:
        rate = self.training.optimizer.param_groups[0]["lr"]
        size = self.training.train_loader.sizes(self.epoch)[t]
        return f"{what} in epoch {self.epoch}, mini-batch {t} (learning rate {rate:g}, batch size {size})"


def first_not_finite_tensor(tensors: Iterator[tuple[str, Tensor]]) -> str | None:
    """The first name whose tensor has an entry that is not finite. One wait for the device however many there are."""
    names, values = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point():
            names.append(name)
            values.append(torch.isfinite(tensor).all())
    bad = torch.stack(values).logical_not().nonzero().flatten().tolist() if values else []
    return names[bad[0]] if bad else None


@contextmanager
def observed(training, objective):
    """An objective with hooks on every layer, and the list of what was not finite, in the order of its appearance.

    The hooks only note and never raise, so that several ranks stay in step.
    """
    found: list[str] = []
    handles = []

    def look(value: Tensor, what: str) -> None:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            found.append(what)

    def watch_layer(name: str, module: nn.Module) -> None:
        def after(_, __, output):
            if isinstance(output, Tensor):
                look(output, f"activation of {name}")
                if output.requires_grad:
                    output.register_hook(lambda gradient: look(gradient, f"gradient at the output of {name}"))

        handles.append(module.register_forward_hook(after))

    for name, module in training.net.named_modules():
        if not any(True for _ in module.children()):
            watch_layer(name or type(module).__name__, module)
    for name, p in training.net.named_parameters():
        if p.requires_grad:
            handles.append(p.register_hook(lambda gradient, name=name: look(gradient, f"gradient of {name}")))

    def watched(net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        look(images, "the images themselves")
        loss, logits = objective(net, images, labels)
        look(loss.detach(), "the loss, of activations that are")
        return loss, logits

    if hasattr(objective, "no_sync"):
        watched.no_sync = objective.no_sync

    # A compiled network would not run the hooks. torch before 2.6 cannot be told so for a while: there the weights tell.
    uncompiled = getattr(torch.compiler, "set_stance", None)
    try:
        with uncompiled("force_eager") if uncompiled else nullcontext():
            yield watched, found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def explain_test_loss(net: nn.Module, loader, device: torch.device) -> str:
    """Which layer's activation is the first that is not finite in a test pass."""
    found: list[str] = []
    net.eval()
    handles = []
    for name, module in net.named_modules():
        if not any(True for _ in module.children()):

            def after(_, __, output, name=name):
                if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                    found.append(f"activation of {name}")

            handles.append(module.register_forward_hook(after))
    for images, labels in loader:
        net(to_device(images, labels, device)[0])
        if found:
            break
    for handle in handles:
        handle.remove()
    return found[0] if found else "the loss, of activations that are"
