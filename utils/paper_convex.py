"""Repeats the comparison of the optimizer's paper on l0-constrained logistic and softmax regression.

    python -m utils.paper_convex --save_path results/paper_convex    # rcv1-, epsilon- and mnist-shaped data, k = 200 and 500
    python -m utils.paper_convex --problem rcv1 --k 200 --passes 2
    python -m utils.paper_convex --problem FILE.svm --k 50

min f(W) subject to at most k non-zero entries of W (Zhou, Yuan, Feng, "Efficient Stochastic Gradient Hard Thresholding", NeurIPS 2018,
section 5): objective gap against passes over the data (gradients evaluated / n) and against thresholdings, of FG-HT, SG-HT, SVRG-HT, HSG-HT
and AHSG-HT, which utils.convex_methods defines. Writes per problem a picture and a JSON file, and table.md.

The protocol, the same for every method: one run from W = 0 per step size of LR_GRID; at each of the passes of BUDGETS the run stands for the
method whose objective is lowest there. The gap is the objective minus the smallest one found anywhere: see utils.convex_methods.best_known.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np

from utils.convex_methods import METHODS, Run, Settings, best_known, run_method
from utils.convex_problems import SYNTHETIC, Problem, make_problem
from utils.errors import UserError, run_main
from utils.options import OneLineParser

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Step sizes times the largest curvature of f: powers of four to both sides of 1.
LR_GRID = (1 / 64, 1 / 16, 1 / 4, 1.0, 4.0, 16.0, 64.0)
# Passes at which the methods are compared, besides the end.
BUDGETS = (1, 2, 5, 10)
# log10 of the gap where the paper's plots end, in the order of METHODS.
PAPER_ENDS = {"rcv1": (-8.7, -7.3, -5.2, -2.2, 3.0), "epsilon": (-11.0, -9.3, -7.8, -6.0, 3.7)}


def compare(problem: Problem, settings: Settings) -> dict:
    """All methods on one problem with one k; returns what goes into the JSON file."""
    smoothness = problem.smoothness()
    tried: dict[str, list[Run]] = {}
    for method in METHODS:
        begin = time.monotonic()
        tried[method] = [run_method(problem, method, c / smoothness, settings) for c in LR_GRID]
        ends = ", ".join(f"{run.objective[-1]:.6g}" for run in tried[method])
        print(f"  {method}: objective {ends} with rising step size, {time.monotonic() - begin:.0f} s", flush=True)
    budgets = [passes for passes in BUDGETS if passes < settings.passes] + [settings.passes]
    chosen = {
        method: {passes: min(runs, key=lambda run: run.at(passes)[0]) for passes in budgets}
        for method, runs in tried.items()
    }
    ends = [runs[settings.passes].weights for runs in chosen.values()]
    reference, own = best_known(problem, settings.k, ends, smoothness)
    # A run may pass below what was found from the ends of the best runs.
    best = min(reference, *(min(run.objective) for runs in tried.values() for run in runs))
    methods = {}
    for method, on_support in zip(METHODS, own, strict=True):
        at = {}
        for passes, run in chosen[method].items():
            objective, thresholdings = run.at(passes)
            at[f"{passes:g}"] = {
                "log10_gap": log_gap(objective - best),
                "thresholdings": thresholdings,
                # Before the first step the step sizes do not differ.
                "lr_times_curvature": run.lr * smoothness if thresholdings else None,
                "curve": {
                    "passes": run.passes,
                    "thresholdings": run.thresholdings,
                    "gap": [objective - best for objective in run.objective],
                },
            }
        methods[method] = {
            "at": at,
            "log10_gap_of_final_support": log_gap(on_support - best),
            "end_objective_by_lr_times_curvature": {f"{r.lr * smoothness:g}": r.objective[-1] for r in tried[method]},
        }
    return {
        "problem": problem.name,
        "synthetic": problem.synthetic,
        "samples": len(problem.labels),
        "features": problem.features.shape[1],
        "classes": max(2, problem.classes),
        "density": density(problem),
        "penalty": problem.penalty,
        "curvature": smoothness,
        "settings": vars(settings),
        "start_objective": tried[METHODS[0]][0].objective[0],
        "best_objective": best,
        "order": {f"{passes:g}": ordered(methods, passes) for passes in budgets},
        "methods": methods,
    }


def density(problem: Problem) -> float:
    """Share of the features that is not zero."""
    return problem.features.count_nonzero() / math.prod(problem.features.shape) if problem.is_sparse else 1.0


def log_gap(gap: float) -> float:
    """log10 of a gap; what rounding leaves of a zero gap counts as 1e-15."""
    return math.log10(max(gap, 1e-15))


def ordered(methods: dict, passes: float) -> list[str]:
    """Methods by their gap, the smallest first; those that are level stay in the paper's order."""
    return sorted(methods, key=lambda method: methods[method]["at"][f"{passes:g}"]["log10_gap"])


def against_paper(gaps: dict[str, float]) -> str:
    """Which neighbours of the paper's order do not stand in that order here, and by how many powers of ten."""
    wrong = [
        f"{lower} {gaps[lower]:+.2f} is not below {upper} {gaps[upper]:+.2f} (by {gaps[lower] - gaps[upper]:.2f})"
        for lower, upper in itertools.pairwise(METHODS)
        if gaps[lower] >= gaps[upper]
    ]
    return "the paper's order" if not wrong else "; ".join(wrong)


def table(results: list[dict], command: str) -> str:
    """The results as Markdown."""
    settings = results[0]["settings"]
    budgets = list(results[0]["order"])
    lines = [
        "# l0-constrained regression: log10 of the objective gap",
        "",
        f"`{command}`. A pass is n gradients, those of SVRG-HT's snapshots among them. From W = 0, mini-batches without replacement: "
        f"{settings['batch_size']} samples for SG-HT and SVRG-HT (a snapshot per epoch), {settings['batch_size']}*{1 + settings['growth']:g}^t up to n "
        f"for HSG-HT and AHSG-HT, over the epochs; v = {settings['v']:g} for AHSG-HT; seed {settings['seed']}. Constant step sizes "
        f"{', '.join(f'{c:g}' for c in LR_GRID)} in units of 1/curvature; every column takes, for every method alike, the one whose objective is "
        "lowest at that column's passes.",
        "",
        'thr. = thresholdings. "support" = the gap that would be left at the optimum on the final support: where it is near the last column\'s gap, the '
        "method is held by its choice of entries, not by its convergence. lr = the step sizes chosen for the columns. * = an end of the grid. "
        "The paper's ends were read off its plots, for the original data.",
        "",
        "| problem | k | method | "
        + " | ".join(f"{p} pass{'' if p == '1' else 'es'}" for p in budgets)
        + " | thr. at 1 | thr. at "
        f"{budgets[-1]} | support | lr | paper's end |",
        "|" + "---|" * (len(budgets) + 8),
    ]
    for result in results:
        paper = PAPER_ENDS.get(result["problem"], ("",) * len(METHODS))
        for method, published in zip(METHODS, paper, strict=True):
            m = result["methods"][method]
            gaps = " | ".join(f"{at['log10_gap']:.2f}" for at in m["at"].values())
            lrs = " ".join(shown_lr(at["lr_times_curvature"]) for at in m["at"].values())
            lines.append(
                f"| {result['problem']} {result['samples']}x{result['features']} | {result['settings']['k']} | {method} | {gaps} "
                f"| {m['at'][budgets[0]]['thresholdings']} | {m['at'][budgets[-1]]['thresholdings']} "
                f"| {m['log10_gap_of_final_support']:.2f} | {lrs} | {published} |"
            )
    lines += ["", "Order (the paper's: " + " < ".join(METHODS) + "):", ""]
    for result in results:
        for passes in budgets:
            gaps = {method: m["at"][passes]["log10_gap"] for method, m in result["methods"].items()}
            found = " < ".join(result["order"][passes])
            lines.append(
                f"- {result['problem']}, k={result['settings']['k']}, {passes} pass{'' if passes == '1' else 'es'}: {found}; {against_paper(gaps)}"
            )
    return "\n".join(lines) + "\n"


def shown_lr(c: float | None) -> str:
    """A step size of the grid as in the table; - where no step was taken."""
    if c is None:
        return "-"
    return f"{c:.3g}{'*' if c >= 0.999 * max(LR_GRID) or c <= 1.001 * min(LR_GRID) else ''}"


def draw(results: list[dict], path: Path) -> None:
    """One row of panels per k: log10 of the gap in the first pass; against passes; against thresholdings."""
    figure, panels = plt.subplots(len(results), 3, figsize=(15, 4 * len(results)), layout="constrained", squeeze=False)
    for row, result in zip(panels, results, strict=True):
        end = list(result["order"])[-1]
        views = (("1" if "1" in result["order"] else end, "passes"), (end, "passes"), (end, "thresholdings"))
        for panel, (budget, axis) in zip(row, views, strict=True):
            for method, marker in zip(METHODS, "osv^D", strict=True):
                at = result["methods"][method]["at"][budget]
                shown = np.searchsorted(at["curve"]["passes"], float(budget) + 1e-9)
                gaps = [log_gap(gap) for gap in at["curve"]["gap"][:shown]]
                label = f"{method} {at['log10_gap']:.2f}"
                panel.plot(at["curve"][axis][:shown], gaps, marker=marker, markersize=3, label=label)
            panel.set_xlabel("passes (gradients / n)" if axis == "passes" else "thresholdings")
            panel.set_ylabel("log10 of the objective gap")
            kind = "-shaped (synthetic)" if result["synthetic"] else ""
            panel.set_title(
                f"{result['problem']}{kind}, k = {result['settings']['k']}: lr best at {budget}", fontsize=10
            )
            panel.grid(alpha=0.3)
            if axis == "thresholdings":
                panel.set_xscale("symlog", linthresh=10)
        row[0].legend(title="gap at 1 pass" if views[0][0] == "1" else "gap at the end", fontsize=8)
        row[1].legend(title=f"gap at {end}", fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--problem", nargs="+", default=list(SYNTHETIC), help="rcv1, epsilon, mnist or libsvm files")
    parser.add_argument("--k", nargs="+", type=int, default=[200, 500], help="entries of W kept")
    parser.add_argument("--passes", type=float, default=10, help="passes over the data per run, >= 1")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="samples, fixed for SG-HT and SVRG-HT, first for HSG-HT and AHSG-HT"
    )
    parser.add_argument("--growth", type=float, default=0.01, help="k of s_t = s_0*(1+k)^t")
    parser.add_argument("--v", type=float, default=0.9, help="heavy-ball weight of AHSG-HT")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic data and of the mini-batches")
    parser.add_argument("--save_path", type=Path, default=Path("runs/paper_convex"), help="a folder without a table.md")
    args = parser.parse_args(argv)
    if args.passes < 1 or not math.isfinite(args.passes):
        raise UserError(f"--passes must be a number >= 1, got {args.passes:g}")
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be >= 1, got {args.batch_size}")
    if not 0 < args.growth < 1:
        raise UserError(f"--growth must be between 0 and 1, got {args.growth:g}")
    if not 0 <= args.v < 1:
        raise UserError(f"--v must be in [0, 1), got {args.v:g}")
    if args.seed < 0:
        raise UserError(f"--seed must be >= 0, got {args.seed}")
    stems = [name if name in SYNTHETIC else Path(name).stem for name in args.problem]
    for stem, count in Counter(stems).items():
        if count > 1:
            raise UserError(
                f"--problem: {count} of them would write {stem}.json; rename a file, or give each its own --save_path"
            )
    if (args.save_path / "table.md").exists():
        raise UserError(f"--save_path {args.save_path}: holds the table of an earlier comparison; give another folder")
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    command = "python -m utils.paper_convex " + shlex.join(sys.argv[1:] if argv is None else argv)
    args.save_path.mkdir(parents=True, exist_ok=True)
    results = []
    for name in args.problem:
        problem = make_problem(name, args.seed)
        samples, features = problem.features.shape
        for k in args.k:
            if not 1 <= k <= features * problem.classes:
                raise UserError(f"--k {k}: must be in 1..{features * problem.classes}, the entries of W for {name}")
        if args.batch_size > samples:
            raise UserError(f"--batch_size {args.batch_size}: {name} has {samples} samples; give at most that many")
        ours = []
        for k in args.k:
            print(
                f"{problem.name}: {samples} samples, {features} features, {max(2, problem.classes)} classes, k = {k}",
                flush=True,
            )
            ours.append(compare(problem, Settings(k, args.passes, args.batch_size, args.growth, args.v, args.seed)))
        with open(args.save_path / f"{problem.name}.json", "w", encoding="utf-8") as file:
            json.dump({"command": command.strip(), "results": ours}, file, separators=(",", ":"))
        draw(ours, args.save_path / f"{problem.name}.png")
        results += ours
    text = table(results, command.strip())
    (args.save_path / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return results


if __name__ == "__main__":
    run_main(main)
