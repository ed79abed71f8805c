"""Knowledge distillation: a trained teacher guides the student while it is trained and pruned.

loss = ce_weight * cross-entropy + sum over the terms of weight * loss(student, teacher); terms: utils.train.losses.
"""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from utils.base.errors import UserError
from utils.train.device import true_float32
from utils.train.engine import at_least_float32
from utils.train.features import with_features
from utils.train.losses import Term, check_terms
from utils.train.teacher_cache import TeacherCache

# The activations of 32 images of 32x32 stay in the cache of a CPU core: a CIFAR ResNet's forward pass took 8 % less
# time. Networks with more weights in a convolution are faster undivided.
CACHED_PIXELS, CACHED_WEIGHTS = 32 * 32 * 32, 1 << 16


class Distillation:
    """The objective of a distilled run; see utils.train.engine for how it is called.

    Args:
        teacher: a trained network. It is left as it is; a frozen copy in eval mode is used, see prepare_teacher.
        student: the network that will be trained, for the widths of its features.
        images: a few images, float32 (B, C, H, W), on the device of both networks.
        terms: what is compared, and how.
        ce_weight: weight of the cross-entropy.

    Attributes:
        adapters: by the term's name a map for each compared pair: learned and linear (a 1x1 convolution for stages)
            from the student's width to the teacher's, the identity where they are equal. Trained and saved, no part of
            the student.
        student, teacher: networks that take return_features (utils.train.features), to be compiled if anything is.
        teacher_forward: the teacher's forward pass, or a compiled one.
        cache: where the teacher's outputs are kept, see keep_outputs; None: they are computed for every mini-batch.

    Raises:
        UserError: the two networks cannot be compared in this way.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, images: Tensor, terms: Sequence[Term], ce_weight: float = 1.0
    ):
        self.terms = list(terms)
        check_terms(self.terms)
        self.losses = [term.make_loss() for term in self.terms]
        self.compared = {"logits", *(term.on for term in self.terms)}
        self.ce_weight = ce_weight
        self._net = student
        prepared = prepare_teacher(teacher)
        hands_out = with_features if len(self.compared) > 1 else lambda net: net
        self.teacher, self.student = hands_out(prepared), hands_out(student)
        self.teacher_forward: Callable = self.teacher
        self.cache: TeacherCache | None = None
        largest = max((p.numel() for p in prepared.parameters() if p.dim() == 4), default=0)
        self.divides = images.device.type == "cpu" and largest <= CACHED_WEIGHTS
        self.adapters = self._make_adapters(images)

    def __call__(self, net: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted sum, and the student's logits (B, classes). `net` is the student, or its compiled forward
        pass.
        """
        teacher = self.teacher_features(images)
        student = self._outputs(self.student if net is self._net else net, images)
        logits = at_least_float32(student["logits"][0])
        total = self.ce_weight * F.cross_entropy(logits, labels)
        for term, loss in zip(self.terms, self.losses, strict=True):
            for adapter, ours, theirs in zip(self.adapters[term.name], student[term.on], teacher[term.on], strict=True):
                # Under autocast too: the squares of features overflow half precision, and bfloat16 keeps 8 bits of
                # them.
                distance = loss(at_least_float32(adapter(ours)), at_least_float32(theirs), labels)
                total = total + term.weight * distance
        return total, logits

    def keep_outputs(self, cache: TeacherCache, images: Tensor) -> None:
        """Reads the teacher's outputs from a cache, and writes those that it has not; `images` as in __init__.

        The terms compare logits and features; stages are too large.

        Raises:
            UserError: the cache has outputs of another teacher.
        """
        with true_float32():
            cache.check(images, self._run_teacher(images))
        self.cache = cache

    def teacher_features(self, images: Tensor) -> dict[str, list[Tensor]]:
        """The teacher's outputs for the student's images, by the names of KD_ON."""
        if self.cache is None:
            return self._run_teacher(images)
        return self.cache.get(images, self.compared) or self.cache.put(images, self._run_teacher(images))

    @torch.no_grad()
    def _run_teacher(self, images: Tensor) -> dict[str, list[Tensor]]:
        if not self.divides or self.teacher_forward is not self.teacher:
            return self._outputs(self.teacher_forward, images)
        size = max(1, torch.get_num_threads() * CACHED_PIXELS // images[0, 0].numel())
        parts = [self._outputs(self.teacher, part) for part in images.split(size)]
        return {on: [torch.cat(x) for x in zip(*(part[on] for part in parts), strict=True)] for on in self.compared}

    def _outputs(self, forward: Callable, images: Tensor) -> dict[str, list[Tensor]]:
        if len(self.compared) == 1:
            return {"logits": [forward(images)]}
        logits, features, stages = forward(images, return_features=True)
        outputs = {"logits": [logits], "feature": [] if features is None else [features], "stages": list(stages)}
        return {on: outputs[on] for on in self.compared}

    @torch.no_grad()
    def _make_adapters(self, images: Tensor) -> nn.ModuleDict:
        was_training = self._net.training
        student = self._outputs(self.student.eval(), images)
        self.student.train(was_training)
        teacher = self.teacher_features(images)
        adapters = nn.ModuleDict()
        for term, loss in zip(self.terms, self.losses, strict=True):
            shapes = [[tuple(x.shape[1:]) for x in outputs[term.on]] for outputs in (student, teacher)]
            rank = 3 if term.on == "stages" else 1
            if not shapes[0] or [s[1:] for s in shapes[0]] != [s[1:] for s in shapes[1]] or len(shapes[0][0]) != rank:
                found = "shapes on '{}': student {}, teacher {}".format(term.on, *(s or "unknown" for s in shapes))
                raise UserError(
                    f"--kd {term}: cannot be compared, {found}; use --kd logits:KL, or let the network return them "
                    "(README, Extending)"
                )
            pairs = [(ours[0], theirs[0]) for ours, theirs in zip(*shapes, strict=True)]
            if term.on == "logits" and pairs[0][0] != pairs[0][1]:
                classes = "the student has {} classes, the teacher {}".format(*pairs[0])
                raise UserError(f"{classes}; use a teacher of the same data set")
            linear = nn.Linear if rank == 1 else lambda ours, theirs: nn.Conv2d(ours, theirs, 1)
            equal = [ours == theirs or not getattr(loss, "same_width", True) for ours, theirs in pairs]
            maps = [nn.Identity() if same else linear(*pair) for same, pair in zip(equal, pairs, strict=True)]
            adapters[term.name] = nn.ModuleList(maps)
        return adapters.to(images.device)


def prepare_teacher(teacher: nn.Module) -> nn.Module:
    """A frozen copy in eval mode and channels_last layout, BatchNorm folded into the convolutions before it.

    Logits, features and stage outputs are the same but for rounding. A network that torch.fx cannot trace keeps its
    BatchNorm.
    """
    teacher = copy.deepcopy(teacher).requires_grad_(False).eval()
    try:
        graph = fx.Tracer().trace(teacher)
    except Exception:  # of any kind: what a network does with a stand-in for its input is not known
        return teacher.to(memory_format=torch.channels_last)
    modules = dict(teacher.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, bn = modules[before.target], modules[node.target]
        called_once = calls.count(node.target) == calls.count(before.target) == 1
        if isinstance(conv, nn.Conv2d) and isinstance(bn, nn.BatchNorm2d) and bn.track_running_stats and called_once:
            for name, module in ((before.target, fuse_conv_bn_eval(conv, bn)), (node.target, nn.Identity())):
                parent, _, last = name.rpartition(".")
                setattr(teacher.get_submodule(parent), last, module)
    return teacher.eval().to(memory_format=torch.channels_last)
