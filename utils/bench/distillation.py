"""What distillation costs: `python -m utils.bench.distillation [--student resnet20] [--teacher resnet56] [--repeats 15]`.

Times, in one process and in turn, a training step without a teacher, the same step with one, and the teacher's forward pass
alone; prints medians with their spread, and what the teacher adds to the step as a share of its forward pass.
The teacher has random weights: only time is measured.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import models
from AHSG_HT import AHSG_HT
from utils.base.errors import run_main
from utils.train.device import choose_device
from utils.train.distillation import Distillation
from utils.train.objective import cross_entropy
from utils.train.options import OneLineParser, count, whole

WARM_UP = 2


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet20", help="network that is trained")
    parser.add_argument("--teacher", default="resnet56", help="network that guides it")
    parser.add_argument("--batch_size", type=count, default=128, help="images per step")
    parser.add_argument("--repeats", type=count, default=15, help="measurements of each")
    parser.add_argument("--ngpu", type=whole, help="0: CPU (default: a GPU where there is one)")
    args = parser.parse_args(argv)
    device = choose_device(args.ngpu)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (args.batch_size,), device=device)
    student, teacher = (
        models.build(name).to(device, memory_format=torch.channels_last) for name in (args.student, args.teacher)
    )
    optimizer = AHSG_HT(student.parameters(), lr=1e-3, momentum=0.9, nesterov=True, v=0.1, HTrate=0.7)
    distilled = Distillation(teacher, student, images[:2])

    def step(objective):
        loss, _ = objective(student, images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    work = {
        "step without teacher": lambda: step(cross_entropy),
        "step with teacher": lambda: step(distilled),
        "teacher's forward pass": lambda: distilled.guides(images),
    }
    times = {name: [] for name in work}
    for repeat in range(WARM_UP + args.repeats):
        for name, run in work.items():
            _wait(device)
            begin = time.perf_counter()
            run()
            _wait(device)
            if repeat >= WARM_UP:
                times[name].append(1000 * (time.perf_counter() - begin))
    print(
        f"{args.student} from {args.teacher}, batch {args.batch_size}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:24} median {medians[name]:8.1f} ms   min {min(values):8.1f}   max {max(values):8.1f}")
    plain, guided, forward = medians.values()
    print(
        f"a teacher makes the step {guided / plain:.2f} times as long; it adds {(guided - plain) / forward:.2f} of the teacher's forward pass"
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    run_main(main)
