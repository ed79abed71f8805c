"""A whole training run: epochs, evaluation, checkpoints, log and results. Both training scripts end here."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

import data
from AHSG_HT import AHSG_HT
from utils.base import checkpoint as checkpoints
from utils.base.errors import UserError
from utils.base.signals import Stopped, stop
from utils.small.counts import multiply_adds
from utils.small.cut import make_small
from utils.small.filters import Layer, count_zero_filters, kept_filters
from utils.small.output import small_table, write_small
from utils.train.curves import draw_curves
from utils.train.device import describe_machine, describe_versions
from utils.train.diagnosis import Watch, explain_test_loss
from utils.train.distributed import average_batchnorm, gather, is_first, plain_batchnorm, rank, world_size
from utils.train.engine import PassResult, RunningMeans, evaluate, train_epoch
from utils.train.optimizer_state import restore_optimizer
from utils.train.progress import EpochProgress, format_seconds
from utils.train.recipes import learning_rate_at
from utils.train.run_folder import RunFolder

# Images on which the small network is compared with the masked one.
COMPARED = 500
# Seconds between two drawings of the curves while a run is under way.
DRAW_SECONDS = 60


@dataclass
class Training:
    """Everything one run needs; `train` runs it.

    Attributes:
        args: the resolved settings, saved with checkpoints and results.
        arch: registry name of the network that is trained.
        data_source: where the images came from, in words.
        objective: what is minimised; see utils.train.objective.
        plan: filters to keep per convolution.
        history: a row of metrics per epoch of this run.
        epochs_done: epochs behind the network, more than the history where it came from a file of others.
        position: mini-batches behind it of the epoch under way; all of them while the network is tested.
        resume_command: the command line that continues from a file, for the last words of a run that is stopped.
        best: best test accuracy of this run so far, in %; -1 before the first epoch.
        facts: further entries for results.json.
        network_facts: what checkpoints say of the network besides `arch`, "library" and "input_shape".
        start: filters that were not zero in the checkpoint that the run started from; None for a new network.
    """

    args: argparse.Namespace
    run: RunFolder
    arch: str
    num_classes: int
    net: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Callable
    train_loader: object
    test_loader: object
    device: torch.device
    plan: list[Layer]
    data_source: str
    history: list[dict] = field(default_factory=list)
    epochs_done: int = 0
    position: int = 0
    resume_command: Callable[[str], str] = lambda file: f"--resume {file}"
    best: float = -1.0
    facts: dict = field(default_factory=dict)
    network_facts: dict = field(default_factory=dict)
    start: dict[str, list[int]] | None = None
    _means: RunningMeans | None = None
    _saved_means: dict | None = None
    _saved: tuple[str, int, int] | None = None

    @property
    def adapters(self) -> nn.Module | None:
        """What is trained beside the network: the adapters of a distilled run."""
        return getattr(self.objective, "adapters", None)

    @property
    def thresholds(self) -> bool:
        return isinstance(self.optimizer, AHSG_HT) and self.args.HTrate < 1

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything that a checkpoint keeps and that must be finite, by name."""
        yield from self.net.state_dict().items()
        yield from (self.adapters.state_dict().items() if self.adapters is not None else ())
        names = {p: name for name, p in self.net.named_parameters()}
        for p, state in self.optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    yield f"{key} of {names.get(p, 'an adapter')}", value

    def train(self) -> dict | None:
        """Runs the epochs that are left and returns what it wrote to results.json; None when no epoch was ever run here.

        Raises:
            Stopped: on SIGTERM or Ctrl-C, after the mini-batch at hand, with a checkpoint.
            UserError: the loss is not finite, or the filters break the plan.
        """
        try:
            with stop.deferred():
                self._run_epochs()
            if not self.history:
                return None
            # Also when no epoch was left: the run may have been killed between its last checkpoint and its results.
            if is_first():
                self.facts["network"] = self.count_network()
            if self.thresholds and is_first():
                self.facts["small"] = self.write_small()
            return self.write_results(kept_filters(self.net), curves=True)
        except Stopped as stopped:
            command = self.resume_command(self._saved[0]) if self._saved else None
            stopped = Stopped(stopped.signum, self.last_good(), command)
            self.run.log(f"\n{stopped}", show=False)
            raise stopped from None
        finally:
            self.train_loader.close()
            self.test_loader.close()

    def _run_epochs(self) -> None:
        args = self.args
        self.run.rewrite_metrics(self.history)
        last_drawn, begin, begin_epoch = time.monotonic(), time.monotonic(), self.epochs_done
        for epoch in range(begin_epoch, args.epochs):
            lr = learning_rate_at(epoch, args.learning_rate, args.schedule, args.gammas)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            done = epoch - begin_epoch
            need = (time.monotonic() - begin) / done * (args.epochs - epoch) if done else 0
            self.run.log(
                f"\n==>>[{time.strftime('%Y-%m-%d-%H:%M:%S')}] [Epoch={epoch:03d}/{args.epochs:03d}] [Need: {format_seconds(need)}] "
                f"[learning_rate={lr:6.4f}] [Best : Accuracy={max(self.best, 0):.2f}, Error={100 - max(self.best, 0):.2f}]"
            )
            trained = self._train_epoch(epoch)
            self.run.log(format_pass("Train", trained))
            tested = evaluate(self.net, self.test_loader, self.device, on_batch=self._stop_while_testing)
            self.run.log(format_pass("Test", tested))
            if not math.isfinite(tested.loss):
                layer = explain_test_loss(self.net, self.test_loader, self.device)
                raise UserError(
                    f"the test loss of epoch {epoch} is {tested.loss} (learning rate {lr:g}), first not finite: {layer}; "
                    f"lower --learning_rate; {self.last_good()}"
                )
            kept = kept_filters(self.net)
            check_same_on_all_ranks(kept, epoch)
            self.log_bad_images()
            if self.thresholds:
                self.run.log(f"  **Filters** zero: {count_zero_filters(self.plan, kept)}")
            row = dict(
                epoch=epoch,
                lr=lr,
                train_loss=trained.loss,
                train_acc=trained.top1,
                test_loss=tested.loss,
                test_acc=tested.top1,
                images_per_s=trained.images_per_s,
                seconds=trained.seconds + tested.seconds,
            )
            self.history.append(row)
            self.epochs_done, self.position, self._means = epoch + 1, 0, None
            is_best = tested.top1 > self.best
            self.best = max(self.best, tested.top1)
            self._save(is_best=is_best)
            self.run.append_metrics(row)
            if self.epochs_done < args.epochs:
                self.write_results(kept, curves=time.monotonic() - last_drawn > DRAW_SECONDS)
                last_drawn = time.monotonic() if time.monotonic() - last_drawn > DRAW_SECONDS else last_drawn
            if signum := stop.pending():
                raise Stopped(signum)

    def _train_epoch(self, epoch: int) -> PassResult:
        """The training pass of an epoch, or what is left of it."""
        args, loader = self.args, self.train_loader
        steps, first = len(loader.sizes(epoch)), self.position
        loader.load_state_dict({"seed": loader.seed, "epoch": epoch, "position": first})
        self._means = RunningMeans(self.device, self._saved_means)
        self._saved_means = None
        watch = Watch(self)
        watch.begin(epoch, first)
        with EpochProgress(self.run, epoch, args.epochs, steps, args.print_freq, first) as progress:

            def on_step(t: int, size: int, means: RunningMeans) -> None:
                self.position = t + 1
                is_last = t + 1 == steps
                is_due = args.save_every is not None and (t + 1) % args.save_every == 0 and not is_last
                # After the last mini-batch the ranks bring BatchNorm together first; the test pass stops then.
                signum = stop.pending()
                stops = 0 if is_last else signum
                if is_last or is_due or stops or progress.is_due(t):
                    watch.check(t, means, thorough=bool(is_last or is_due or stops))
                progress.on_step(t, size, means)
                if is_due or stops:
                    self._save(is_best=False)
                if stops:
                    raise Stopped(stops)

            trained = train_epoch(
                self.net,
                loader,
                self.objective,
                self.optimizer,
                self.device,
                epoch=epoch,
                threshold_every=args.threshold_every,
                max_images=args.max_images_per_step,
                on_step=on_step,
                first=first,
                means=self._means,
            )
        if first < steps:
            average_batchnorm(self.net)
        return trained

    def _stop_while_testing(self) -> None:
        if signum := stop.pending():
            self._save(is_best=False)
            raise Stopped(signum)

    def _save(self, *, is_best: bool) -> None:
        self.run.save_checkpoint(self.checkpoint(), is_best)
        self._saved = str(self.run.checkpoint_path(self.arch)), self.epochs_done, self.position

    def last_good(self) -> str:
        """What is on the disk, in words."""
        if self._saved is None:
            return "no checkpoint has been written yet"
        file, epochs, position = self._saved
        within = f" and {position} mini-batches of the next" if position else ""
        return f"'{file}' holds {epochs} of {self.args.epochs} epochs{within}"

    def write_results(self, kept: dict[str, list[int]], *, curves: bool) -> dict:
        """Writes results.json and, on demand, curves.png; returns the results."""
        results = self.results(kept)
        self.run.write_results(results)
        if curves and is_first():
            draw_curves(self.history, self.title(), self.run.path / "curves.png")
        return results

    def log_bad_images(self) -> None:
        """Names the images that this epoch could not read, and counts those of the run."""
        fresh = [path for loader in (self.train_loader, self.test_loader) for path in gather_bad_images(loader)]
        for path in fresh:
            self.run.log(f"  skipped, cannot be read: {path}")
        self.facts["images_skipped"] = self.facts.get("images_skipped", 0) + len(fresh)
        if self.facts["images_skipped"]:
            self.run.log(f"  **Skipped** {self.facts['images_skipped']} images of this run that cannot be read")

    def title(self) -> str:
        kept = f", HTrate {self.args.HTrate:g}" if self.thresholds else ""
        return f"{self.arch} on {self.args.dataset}: {self.args.recipe}{kept}, batch {self.args.batch_size}, seed {self.args.manualSeed}"

    def checkpoint(self) -> dict:
        """The keys of the release (epoch, arch, state_dict, best_prec1, optimizer), and what exact resumption needs. All ranks
        must ask for it together."""
        random_states = gather(checkpoints.random_states())
        return {
            "epoch": self.epochs_done,
            "arch": self.arch,
            "state_dict": self.net.state_dict(),
            "best_prec1": self.best,
            "optimizer": self.optimizer.state_dict(),
            "num_classes": self.num_classes,
            "dataset": self.args.dataset,
            **self.network_facts,
            "settings": vars(self.args),
            "history": self.history,
            "random_states": random_states[0],
            **({"random_states_of_ranks": random_states} if world_size() > 1 else {}),
            "loader": {"seed": self.train_loader.seed, "epoch": self.epochs_done, "position": self.position},
            **self._state_within_epoch(),
            # The student's weights stay deployable by themselves: what only training needs is kept apart.
            **({"adapters": self.adapters.state_dict()} if self.adapters is not None else {}),
        }

    def _state_within_epoch(self) -> dict:
        """What a checkpoint from the middle of an epoch has besides: the means so far, and each rank's own BatchNorm statistics,
        which the end of the epoch brings together."""
        if not self.position:
            return {}
        state = {"running_means": self._means.state_dict()}
        if world_size() > 1:
            state["batchnorm_of_ranks"] = gather({name: buffer.cpu() for name, buffer in self.net.named_buffers()})
        return state

    def restore(self, checkpoint: dict, path: str, *, continues: bool) -> None:
        """Takes weights and momentum from a checkpoint; a run that `continues` also epochs, metrics, loader and random states.

        Raises:
            UserError: weights or optimizer are of another network.
        """
        if checkpoint.get("arch", self.arch) != self.arch:
            raise UserError(
                f"'{path}' is a checkpoint of {checkpoint['arch']}, not of {self.arch}; use --arch {checkpoint['arch']}"
            )
        checkpoints.load_weights(self.net, checkpoint["state_dict"], path)
        self.start = kept_filters(self.net)
        if self.adapters is not None and "adapters" in checkpoint:
            checkpoints.load_weights(self.adapters, checkpoint["adapters"], path)
        if "optimizer" in checkpoint:
            restore_optimizer(self.optimizer, checkpoint["optimizer"], path)
        if not continues:
            return
        self.epochs_done = checkpoint.get("epoch", 0)
        if "settings" in checkpoint:
            self.history.extend(checkpoint["history"])
            self.best = checkpoint["best_prec1"]
            self.train_loader.load_state_dict(checkpoint["loader"])
            self.position = checkpoint["loader"]["position"]
            self._saved_means = checkpoint["running_means"] if self.position else None
            self._saved = path, self.epochs_done, self.position
            buffers = checkpoint.get("batchnorm_of_ranks", [])
            if len(buffers) == world_size():
                for name, buffer in self.net.named_buffers():
                    buffer.copy_(buffers[rank()][name])
            states = checkpoint.get("random_states_of_ranks", [checkpoint["random_states"]])
            if rank() == 0 or len(states) == world_size():
                checkpoints.restore_random_states(states[rank()])
            if len(states) != world_size():
                self.run.log(
                    f"note: '{path}' was written by {len(states)} processes, this run has {world_size()}: mini-batches and weights go on as "
                    "they were; BatchNorm's statistics and dropout depend on how a mini-batch is split"
                )

    def count_network(self) -> dict[str, int]:
        """What results.json says of the network that was trained, its zeroed filters included."""
        net, images = copy.deepcopy(self.net).cpu(), data.first_images(self.test_loader.dataset, 2).cpu()[:1]
        macs = sum(multiply_adds(net, images).values())
        return {"multiply_adds": macs, "parameters": sum(p.numel() for p in net.parameters())}

    def write_small(self) -> dict:
        """Cuts the zeroed filters out and writes small.<arch>.pth.tar; what results.json says of it."""
        test_images = self.test_loader.dataset
        # As many pixels as there are in so many CIFAR images: a large network would be compared for minutes.
        pixels = data.first_images(test_images, 2)[0, 0].numel()
        images = data.first_images(test_images, max(16, COMPARED * 32 * 32 // pixels)).cpu().contiguous()
        masked = plain_batchnorm(copy.deepcopy(self.net)).cpu().eval()
        try:
            small, report = make_small(masked, images[:1], images)
            path, facts = write_small(
                masked,
                small,
                report,
                self.arch,
                tuple(images.shape[1:]),
                self.run.path,
                checkpoint={"dataset": self.args.dataset, **self.network_facts},
            )
        except UserError as error:
            # The trained network is safe in its checkpoint; a run that is done does not fail here.
            self.run.log(f"no small network was written: {error}")
            return {"error": str(error)}
        self.run.log(f"\nsmall network {path}\n{small_table(self.arch, facts, report)}")
        return facts

    def results(self, kept: dict[str, list[int]]) -> dict:
        """The content of results.json."""
        rows = self.history
        best = max(rows, key=lambda row: row["test_acc"])
        return {
            "finished": self.epochs_done >= self.args.epochs,
            "recipe": self.args.recipe,
            "dataset": self.args.dataset,
            "data_source": self.data_source,
            "synthetic_data": self.args.dataset == "synthetic",
            "arch": self.arch,
            "num_classes": self.num_classes,
            "seed": self.args.manualSeed,
            "processes": world_size(),
            "epochs_done": self.epochs_done,
            "epochs_run_here": len(rows),
            "last_epoch_accuracy": rows[-1]["test_acc"],
            "best_epoch_accuracy": best["test_acc"],
            "best_epoch": best["epoch"],
            "HTrate": self.args.HTrate,
            "prune_rate": self.args.prune_rate,
            "seconds": sum(row["seconds"] for row in rows),
            "filters": [
                {
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "kept": len(kept[layer.name]),
                    "kept_indices": kept[layer.name],
                }
                for layer in self.plan
            ],
            **self.facts,
            "settings": vars(self.args),
            "optimizer": type(self.optimizer).__name__,
            "machine": describe_machine(self.device),
            "versions": describe_versions(),
        }


def gather_bad_images(loader) -> list[str]:
    """Paths of the images that a loader has skipped since the last call, over all ranks."""
    if not hasattr(loader.dataset, "newly_bad"):
        return []
    return sorted({path for paths in gather(loader.dataset.newly_bad()) for path in paths})


def check_same_on_all_ranks(kept: dict[str, list[int]], epoch: int) -> None:
    """Raises UserError on every rank when the ranks do not keep the same filters. They decide without a word to each other."""
    digests = gather(hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16])
    other = next((r for r, digest in enumerate(digests) if digest != digests[0]), None)
    if other is not None:
        raise UserError(
            f"after epoch {epoch} ranks 0 and {other} keep different filters ({digests[0]} and {digests[other]}): their weights have parted; "
            "resume the last checkpoint, and look for a machine that computes wrongly"
        )


def format_pass(name: str, result: PassResult) -> str:
    """The release's line, `**Test** Prec@1 .. Prec@5 .. Error@1 ..`."""
    return f"  **{name}** Prec@1 {result.top1:.3f} Prec@5 {result.top5:.3f} Error@1 {100 - result.top1:.3f}"
