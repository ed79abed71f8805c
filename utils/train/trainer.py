"""A whole training run: epochs, evaluation, checkpoints, log, results and the small network. Both scripts use it."""

import argparse
import copy
import math
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch
from torch import nn
from tqdm import tqdm

import data
import models
from AHSG_HT import AHSG_HT
from utils.base.errors import UserError
from utils.base.signals import Stopped, stop
from utils.prune.gradual import GradualPruning
from utils.small.counts import count
from utils.small.cut import Report, check_equal
from utils.small.filters import check_plan, count_zero_filters, kept_filters, plan_convolutions
from utils.small.output import renumber
from utils.train import report, snapshot
from utils.train.acceleration import accelerate, choose_acceleration
from utils.train.device import true_float32
from utils.train.distributed import (
    LostRank,
    ParallelObjective,
    average_batchnorm,
    describe_loss,
    gather,
    is_first,
    is_lost_connection,
    launcher,
    rank,
    world_size,
)
from utils.train.engine import PassResult, RunningMeans, evaluate, format_pass, gather_bad_images, train_step
from utils.train.recipes import learning_rate_at
from utils.train.resume import Start, resume_command
from utils.train.run_folder import RunFolder

# Seconds between two drawings of the curves while a run is under way.
DRAW_SECONDS = 60
# Test images on which the network is compared before and after a cut.
CUT_COMPARED = 32


class Trainer:
    """Trains one network; `train` runs the epochs that are left, `finish` writes the small network and the results.

    Args:
        command: name of the script and its arguments, for the commands that are printed and saved.
        args: the resolved settings, saved with checkpoints and results.
        start: where the run starts; see utils.train.resume.
        images: the data set.
        net: the network to train, on `device`.
        optimizer: of its parameters and the objective's adapters.
        objective: what is minimised; see utils.train.engine.
        train_loader, test_loader: over the images.
        facts: further entries for results.json.

    Attributes:
        history: a row of metrics per epoch of this run.
        epochs_done: epochs behind the network, more than the history where it came from a file of another project.
        trains: whether there are epochs left when the run starts.
        position: mini-batches behind it of the epoch under way; all of them while the network is tested.
        best: best test accuracy of this run so far, in %; -1 before the first epoch.
        first_counted: from this epoch on an accuracy can be the best one.
        hits: which test images the network was right on after the latest epoch, as text; None where not known.
        adapters: what is trained beside the network in a distilled run.
        network_facts: what a checkpoint must hold besides `arch` for the network to be built again.
        pruning: gradual pruning; None for the other recipes.
        arithmetics: number formats, with the number of processes where there are several, of all pieces of the run.
        thresholds: whether the optimizer thresholds filters by itself.
        means, saved_means: of the training pass under way; those of a checkpoint that it continues from.
        saved: file, epochs and mini-batches of the latest checkpoint.
        kept_at_start: filters of the checkpoint that the run started from.
        numbering: {weight: numbers in the unpruned network of the filters that it began with}; {} for all of them.
        cost, shapes: of the unpruned network.
    """

    def __init__(
        self,
        command: list[str],
        args: argparse.Namespace,
        start: Start,
        images: data.Data,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        objective: Callable,
        train_loader: data.DataLoader,
        test_loader: data.DataLoader,
        device: torch.device,
        facts: dict,
    ):
        self.command, self.args, self.start, self.images, self.device = command, args, start, images, device
        self.net, self.optimizer, self.train_loader, self.test_loader = net, optimizer, train_loader, test_loader
        self.facts, self.arch = facts, args.student
        self.network_facts = {"input_shape": list(images.train.image_shape), "normalisation": images.normalisation}
        if args.dataset == "imagenet":
            self.network_facts["library"] = "torchvision"
        self.history: list[dict] = []
        self.epochs_done, self.position, self.best, self.pieces = 0, 0, -1.0, 1
        self.hits: str | None = None
        self.means: RunningMeans | None = None
        self.saved_means: dict | None = None
        self.saved: tuple[str, int, int] | None = None
        self.kept_at_start: dict[str, list[int]] | None = None
        self._objective, self.adapters = objective, getattr(objective, "adapters", None)
        self.acceleration = choose_acceleration(args, device)
        several = f", {world_size()} processes" if world_size() > 1 else ""
        self.arithmetics = [f"{self.acceleration.arithmetic}{several}"]
        largest = max(max(train_loader.sizes(epoch)) for epoch in (0, args.epochs - 1))
        self._largest = min(-(-largest // world_size()), args.max_images_per_step or largest)
        self.example = data.first_images(images.test, 2).cpu()[:1]
        saved = start.checkpoint if start.continues and "settings" in start.checkpoint else {}
        # Of the unpruned network, also where the run starts from one that has been cut already.
        first = start.checkpoint or {}
        self.numbering = saved.get("numbering", {}) if saved else first.get("kept", {})
        self.cost, self.shapes = first.get("cost"), first.get("shapes")
        if None in (self.cost, self.shapes) or first.get("input_shape") != self.network_facts["input_shape"]:
            full = models.build_full(first, self.arch, args.resume) if first.get("kept") else copy.deepcopy(net).cpu()
            self.cost = count(full, self.example)._asdict()
            self.shapes = self.shapes or {n: list(p.shape) for n, p in full.named_parameters() if p.dim() == 4}
        self.convolutions = plan_convolutions(net, optimizer)
        self.thresholds = isinstance(optimizer, AHSG_HT) and any(layer.removed for layer in self.convolutions)
        # Before weights are restored: DistributedDataParallel gives every rank the BatchNorm statistics of the first.
        self._wrap()
        if world_size() > 1:
            torch.manual_seed(args.manualSeed + rank() * 0x9E3779B1)  # every rank its own dropout
        if start.checkpoint:
            snapshot.restore(self, start.checkpoint, args.resume, continues=start.continues)
        self.pruning: GradualPruning | None = None
        if args.recipe == "prune_gradual":
            names = ("HTrate", "macs_cut", "tied", "round_to", "allocation", "shrink")
            options = {name: getattr(args, name) for name in names}
            options |= dict(begin=args.prune_begin, end=args.prune_end, score=args.prune_score)
            options |= dict(steps=self.steps_before(args.epochs), state=saved.get("pruning"))
            self.pruning = GradualPruning(net, optimizer, self.example.to(device), **options)
        # Epochs before all filters are gone are of a wider network: the best epoch is none of them.
        ends = accumulate(len(train_loader.sizes(epoch)) for epoch in range(args.epochs))
        last = self.pruning.last if self.pruning else 0
        self.first_counted = next(epoch for epoch, end in enumerate(ends) if end > last)

    def _wrap(self) -> None:
        """Makes the objective that is called in training, of the network as it is now."""
        # The old wrapper must go first: DistributedDataParallel removes its hooks from the parameters then.
        self.objective = None
        if self.acceleration.compile:
            torch._dynamo.reset()  # it compiles one function a limited number of times, here once after every cut
        objective = accelerate(self.net, self._objective, self.device, self.acceleration, self._largest)
        self.objective = ParallelObjective(self.net, objective, self.device) if world_size() > 1 else objective

    def steps_before(self, epoch: int) -> int:
        """Mini-batches of the epochs before this one."""
        return sum(len(self.train_loader.sizes(e)) for e in range(epoch))

    def train(self, run: RunFolder) -> None:
        """Runs the epochs that are left, in a folder.

        Raises:
            Stopped: on SIGTERM or Ctrl-C, after the mini-batch at hand, with a checkpoint.
            UserError: the loss is not finite, or the filters do not follow the plan.
        """
        self.run, self.trains = run, self.epochs_done < self.args.epochs
        report.log_settings(self)
        try:
            with self._explained(), stop.deferred():
                run.write_metrics(self.history)
                first = self.epochs_done
                if self.pruning and self.pruning.at_once and self.trains:
                    step = self.steps_before(first) + self.position
                    self._prune(step)
                    self._cut(step)
                drawn = time.monotonic()
                for epoch in range(first, self.args.epochs):
                    self._log_epoch(epoch)
                    self._run_epoch(epoch)
                    if self.epochs_done < self.args.epochs:
                        is_due = time.monotonic() - drawn > DRAW_SECONDS
                        report.write_report(self, curves=is_due)
                        drawn = time.monotonic() if is_due else drawn
                    if signum := stop.pending():
                        raise Stopped(signum)
        finally:
            self.train_loader.close()
            self.test_loader.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Where a signal or a lost process ends the run, the message names what is on the disk and how to continue."""
        try:
            yield
        except Stopped as stopped:
            script, *argv = self.command
            command = resume_command(script, argv, self.saved[0], launcher()) if self.saved else None
            stopped = Stopped(stopped.signum, self.last_good(), command)
            self.run.log(f"\n{stopped}", show=False)
            raise stopped from None
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            remedy = "start the run again"
            if self.saved:
                remedy = f"with any number of processes continue with --resume {shlex.quote(self.saved[0])}"
            raise LostRank(f"{describe_loss(error)}; {self.last_good()}; {remedy}") from None

    def _run_epoch(self, epoch: int) -> None:
        """Training pass, cut of the network, test pass, checkpoint and metrics of one epoch."""
        trained = self._train_epoch(epoch)
        self.run.log(format_pass("Train", trained))
        if self.pruning:
            self._cut(self.steps_before(epoch + 1))
        tested = evaluate(self.net, self.test_loader, self.device, on_batch=self._stop_while_testing)
        self.run.log(format_pass("Test", tested))
        if not math.isfinite(tested.loss):
            raise UserError(f"the test loss of epoch {epoch} is {tested.loss}; {self._remedy()}")
        kept = self.kept()
        check_same_on_all_ranks(kept, epoch)
        self._log_bad_images()
        if self.thresholds:
            self.run.log(f"  **Filters** zero: {count_zero_filters(self.convolutions, kept)}")
        losses = dict(train_loss=trained.loss, train_acc=trained.top1, test_loss=tested.loss, test_acc=tested.top1)
        times = dict(images_per_s=trained.images_per_s, seconds=trained.seconds + tested.seconds)
        self.history.append(dict(epoch=epoch, lr=learning_rate_at(epoch, vars(self.args)), **losses, **times))
        self.epochs_done, self.position, self.means = epoch + 1, 0, None
        # Images that cannot be read are missing in a pass, and the others out of place.
        is_whole = tested.hits is not None and len(tested.hits) == len(self.images.test)
        self.hits = report.pack_hits(tested.hits, self.images.test.fingerprint()) if is_whole else None
        is_best = tested.top1 > self.best or epoch == self.first_counted
        self.best = tested.top1 if is_best else self.best
        self._save(is_best=is_best)
        self.run.write_metrics(self.history)

    def _cut(self, step: int) -> None:
        """Cuts out the filters that were removed, if any; the log says by how much this changes the logits."""
        if not self.pruning.can_cut:
            return
        images, comparison = data.first_images(self.images.test, CUT_COMPARED).to(self.device), Report()
        before = copy.deepcopy(self.net).eval()
        text = self.pruning.cut(step)
        with true_float32():
            check_equal(before, self.net.eval(), [images], comparison)
        self.run.log(f"{text}; logits differ by at most {comparison.difference:.1e} on {len(images)} images")
        self._wrap()  # the parameters are new ones

    def _train_epoch(self, epoch: int) -> PassResult:
        """The training pass of an epoch, or what is left of it."""
        args, loader, net = self.args, self.train_loader, self.net
        sizes, first = loader.sizes(epoch), self.position
        steps, before = len(sizes), self.steps_before(epoch)
        loader.load_state_dict({"seed": loader.seed, "epoch": epoch, "position": first})
        means = self.means = RunningMeans(self.device, self.saved_means)
        self.saved_means = None
        net.train()
        of_all = dict(device=self.device, epoch=epoch, max_images=args.max_images_per_step)
        of_all["normalise"] = loader.dataset.normalise
        # Where a run goes on after an epoch's last mini-batch, its checkpoints hold the rate of that one all the same.
        self._set_learning_rate(epoch + min(first, steps - 1) / steps)
        # A bar on a terminal; disable=None: nothing elsewhere.
        options = dict(total=steps, initial=first, leave=False, disable=None if is_first() else True)
        with tqdm(loader if first < steps else (), f"epoch {epoch + 1}/{args.epochs}", **options) as bar:
            for t, (images, labels) in enumerate(bar, start=first):
                self._set_learning_rate(epoch + t / steps)
                means.t = t
                is_last = t + 1 == steps
                step = dict(size=sizes[t], growth=sizes[t] / sizes[0], before_update=partial(self._prune, before + t))
                step["final"] = int(args.threshold_every == "step" or is_last)
                train_step(self.objective, net, images, labels, self.optimizer, means, **step, **of_all)
                self.position = t + 1
                saves = args.save_every is not None and (t + 1) % args.save_every == 0 and not is_last
                # After the last mini-batch the ranks average BatchNorm first; the test pass stops then.
                signum = stop.pending()
                stops = signum and not is_last
                # Only then are the loss and the means read, which waits for the device.
                logs = t % args.print_freq == 0 or is_last
                if logs or saves or stops:
                    self._check_finite(t, means, weights=bool(is_last or saves or stops))
                if logs:
                    now = means.read()
                    bar.set_postfix(loss=f"{now.loss:.3f}", top1=f"{now.top1:.2f}")
                    line = report.step_line(epoch, f"{t:03d}/{steps:03d}", sizes[t], now)
                    self.run.log(line, show=bar.disable)
                if saves or stops:
                    self._save(is_best=False)
                if stops:
                    raise Stopped(signum)
        if first < steps:
            average_batchnorm(net)
            if self.thresholds:
                try:
                    check_plan(self.convolutions, self.kept(), self.kept_at_start)
                except UserError as error:
                    raise UserError(f"after epoch {epoch}: {error}; {self.last_good()}") from None
        result = means.read()
        if result.images_per_s == 0:
            raise UserError(f"not one training image could be read in epoch {epoch}; check the data path")
        return result

    def _set_learning_rate(self, epoch: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(epoch, vars(self.args))

    def _prune(self, step: int) -> None:
        """Before the update of a step of the whole run: gradual pruning removes the filters whose turn it is."""
        if self.pruning and (text := self.pruning.before_step(step)):
            self.run.log(text)

    def kept(self) -> dict[str, list[int]]:
        """{weight of a convolution: original indices of the filters it keeps}."""
        if self.pruning:
            return renumber(self.pruning.alive_filters, self.numbering)
        return renumber(kept_filters(self.net, getattr(self.optimizer, "additives", None)), self.numbering)

    def present(self) -> dict[str, list[int]]:
        """As `kept`, of all filters that the network has; {} where it is the unpruned one."""
        return renumber(self.pruning.present_filters, self.numbering) if self.pruning else self.numbering

    def _check_finite(self, t: int, means: RunningMeans, *, weights: bool) -> None:
        """Stops the run on all ranks where the loss or, if `weights`, a weight is not finite. Waits for the device.

        Momentum that is not finite is in the weights after the same step.
        """
        bad = int(means.first_bad)
        found = f"the loss of mini-batch {bad}" if bad >= 0 else None
        if found is None and weights:
            found = first_not_finite(nn.ModuleList([self.net, self.adapters or nn.ModuleList()]))
        findings = gather(found)
        if any(findings):
            number, found = next((r, text) for r, text in enumerate(findings) if text)
            where = f" on rank {number}" if len(findings) > 1 else ""
            raise UserError(
                f"{found}{where} is not finite by mini-batch {t} of epoch {self.epochs_done}; {self._remedy()}"
            )

    def _remedy(self) -> str:
        rate = self.optimizer.param_groups[0]["lr"]
        return f"learning rate {rate:g}: lower --learning_rate; {self.last_good()}"

    def _stop_while_testing(self) -> None:
        if signum := stop.pending():
            self._save(is_best=False)
            raise Stopped(signum)

    def _save(self, *, is_best: bool) -> None:
        self.run.save_checkpoint(snapshot.take(self), is_best)
        self.saved = str(self.run.checkpoint_path(self.arch)), self.epochs_done, self.position

    def last_good(self) -> str:
        """What is on the disk, in words."""
        if self.saved is None:
            return "no checkpoint has been written yet"
        file, epochs, position = self.saved
        within = f" and {position} mini-batches of the next" if position else ""
        return f"'{file}' holds {epochs} of {self.args.epochs} epochs{within}"

    def finish(self) -> dict | None:
        """Writes the small network where filters are gone, curves.png and results.json; the results, None without an
        epoch. Where no epoch was left the results stay those of the machine that trained; they are written only if the
        run was killed between its last checkpoint and its results.
        """
        if not self.history:
            return None
        with self._explained():
            results = None if self.trains else report.finished_results(self)
            if results is None:
                if is_first() and (self.thresholds or self.pruning or self.numbering):
                    self.facts["small"] = report.write_small_network(self)
                results = report.write_report(self, curves=True)
        last, best, epoch = (results[name] for name in ("last_epoch_accuracy", "best_epoch_accuracy", "best_epoch"))
        self.run.log(
            f"\nlast epoch {last:.2f} %, best epoch {best:.2f} % (epoch {epoch}); log, metrics.csv, curves.png, "
            f"results.json and checkpoints are in {self.run.path}"
        )
        return results

    def _log_epoch(self, epoch: int) -> None:
        """The release's line at the start of an epoch; the time needed is counted by the epoch before."""
        seconds = self.history[-1]["seconds"] if self.history else 0
        need, best = round(seconds * (self.args.epochs - epoch)), max(self.best, 0)
        self.run.log(
            f"\n==>>[{time.strftime(report.TIME_FORMAT)}] [Epoch={epoch:03d}/{self.args.epochs:03d}] "
            f"[Need: {need // 3600:02d}:{need // 60 % 60:02d}:{need % 60:02d}] [learning_rate="
            f"{learning_rate_at(epoch, vars(self.args)):6.4f}] [Best : Accuracy={best:.2f}, Error={100 - best:.2f}]"
        )

    def _log_bad_images(self) -> None:
        """Names the images that this epoch could not read, and counts those of the run."""
        fresh = [path for loader in (self.train_loader, self.test_loader) for path in gather_bad_images(loader)]
        for path in fresh:
            self.run.log(f"  skipped, cannot be read: {path}")
        self.facts["images_skipped"] = self.facts.get("images_skipped", 0) + len(fresh)
        if self.facts["images_skipped"]:
            self.run.log(f"  **Skipped** {self.facts['images_skipped']} images of this run that cannot be read")


def first_not_finite(module: nn.Module) -> str | None:
    """The first parameter or buffer with an entry that is not finite. One wait for the device however many there
    are.
    """
    tensors = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    bad = torch.stack([value.isfinite().all() for value in tensors.values()]).logical_not().nonzero().flatten().tolist()
    return list(tensors)[bad[0]].partition(".")[2] if bad else None


def check_same_on_all_ranks(kept: dict[str, list[int]], epoch: int) -> None:
    """Raises UserError on every rank when the ranks keep different filters; they choose them without communication."""
    others = gather(kept)
    other = next((r for r, filters in enumerate(others) if filters != others[0]), None)
    if other is not None:
        raise UserError(
            f"after epoch {epoch} ranks 0 and {other} keep different filters: their weights differ; resume the last "
            "checkpoint, and look for a machine that computes wrongly"
        )
