"""Repeats the comparison of the optimizer's paper on l0-constrained logistic and softmax regression.

    python -m utils.paper_convex                                  # rcv1-, epsilon- and mnist-shaped data, k = 200 and 500
    python -m utils.paper_convex --problem rcv1 --k 200 --passes 6
    python -m utils.paper_convex --problem FILE.svm --k 50

Zhou, Yuan, Feng, "Efficient Stochastic Gradient Hard Thresholding", NeurIPS 2018, section 5.1: objective gap against passes over the data
(gradient evaluations / n) and against thresholdings, of FG-HT, SG-HT, SVRG-HT, HSG-HT and AHSG-HT. Writes per problem a picture and a JSON
file, and the table of all into table.md.

Every method runs with every step size of one grid, and the run with the lowest objective at its end stands for it. The gap is the
objective minus the smallest one found: see utils.convex_methods.best_known.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np

from utils.convex_methods import METHODS, Run, Settings, best_known, run_method
from utils.convex_problems import SYNTHETIC, Problem, make_problem
from utils.errors import UserError, run_main

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Step sizes times the largest curvature of f.
LR_GRID = (1 / 4, 1.0, 4.0, 16.0, 64.0)
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
    chosen = {method: min(runs, key=lambda run: run.objective[-1]) for method, runs in tried.items()}
    reference, own = best_known(problem, settings.k, [run.weights for run in chosen.values()], smoothness)
    # A run may pass below what was found from the ends of all runs.
    lowest = min(min(run.objective) for runs in tried.values() for run in runs)
    best = min(reference, lowest)
    methods = {}
    for (method, run), on_support in zip(chosen.items(), own, strict=True):
        methods[method] = {
            "lr_times_curvature": run.lr * smoothness,
            "lr_at_end_of_grid": run.lr * smoothness >= 0.999 * max(LR_GRID)
            or run.lr * smoothness <= min(LR_GRID) * 1.001,
            "passes": run.passes,
            "thresholdings": run.thresholdings,
            "gap": [objective - best for objective in run.objective],
            "log10_gap_at_one_pass": log_gap(run.at(1)[0] - best),
            "thresholdings_at_one_pass": run.at(1)[1],
            "log10_gap_at_end": log_gap(run.objective[-1] - best),
            "log10_gap_of_final_support": log_gap(on_support - best),
            "objective_by_lr_times_curvature": {f"{r.lr * smoothness:g}": r.objective[-1] for r in tried[method]},
        }
    return {
        "problem": problem.name,
        "synthetic": problem.name in SYNTHETIC,
        "samples": len(problem.labels),
        "features": problem.features.shape[1],
        "classes": max(2, problem.classes),
        "density": float(
            np.count_nonzero(problem.features.data if hasattr(problem.features, "nnz") else problem.features)
        )
        / math.prod(problem.features.shape),
        "penalty": problem.penalty,
        "curvature": smoothness,
        "settings": vars(settings),
        "best_objective": best,
        "order_at_one_pass": ordered(methods, "log10_gap_at_one_pass"),
        "order_at_end": ordered(methods, "log10_gap_at_end"),
        "methods": methods,
    }


def log_gap(gap: float) -> float:
    """log10 of a gap; what rounding leaves of a zero gap counts as 1e-15."""
    return math.log10(max(gap, 1e-15))


def ordered(methods: dict, key: str) -> list[str]:
    """Methods by their gap, the smallest first; those that are level stay in the paper's order."""
    return sorted(methods, key=lambda method: methods[method][key])


def against_paper(result: dict, when: str) -> str:
    """Which neighbours of the paper's order do not stand in that order here, and by how many powers of ten."""
    gaps = [result["methods"][method][f"log10_gap_at_{when}"] for method in METHODS]
    wrong = [
        f"{METHODS[i]} {gaps[i]:+.2f} is not below {METHODS[i + 1]} {gaps[i + 1]:+.2f} (by {gaps[i] - gaps[i + 1]:.2f})"
        for i in range(len(METHODS) - 1)
        if gaps[i] >= gaps[i + 1]
    ]
    return "the paper's order" if not wrong else "; ".join(wrong)


def table(results: list[dict], command: str) -> str:
    """The results as Markdown."""
    lines = [
        "# l0-constrained regression: log10 of the objective gap",
        "",
        f'`{command}`. A pass is n gradient evaluations; thr. = thresholdings. "support" is the gap that would be left at the optimum of the',
        "final support: a method that has reached it is held by its choice of entries, not by its convergence. lr is in units of 1/curvature,",
        "* at an end of the grid.",
        "",
        "| problem | k | method | 1 pass | thr. | end | support | lr | paper's end |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        paper = PAPER_ENDS.get(result["problem"], ("",) * len(METHODS))
        for method, published in zip(METHODS, paper, strict=True):
            m = result["methods"][method]
            lines.append(
                f"| {result['problem']} {result['samples']}x{result['features']} | {result['settings']['k']} | {method} "
                f"| {m['log10_gap_at_one_pass']:.2f} | {m['thresholdings_at_one_pass']} | {m['log10_gap_at_end']:.2f} "
                f"| {m['log10_gap_of_final_support']:.2f} | {m['lr_times_curvature']:.3g}{'*' if m['lr_at_end_of_grid'] else ''} | {published} |"
            )
    lines += ["", "Order (the paper's: " + " < ".join(METHODS) + "):", ""]
    for result in results:
        for when, words in (("one_pass", "at one pass"), ("end", f"after {result['settings']['passes']:g} passes")):
            lines.append(f"- {result['problem']}, k={result['settings']['k']}, {words}: {against_paper(result, when)}")
    return "\n".join(lines) + "\n"


def draw(results: list[dict], path: Path) -> None:
    """One row of panels per k: log10 of the gap against passes, and against thresholdings."""
    figure, panels = plt.subplots(len(results), 2, figsize=(11, 4 * len(results)), layout="constrained", squeeze=False)
    for row, result in zip(panels, results, strict=True):
        for panel, axis in zip(row, ("passes", "thresholdings"), strict=True):
            for method, marker in zip(METHODS, "osv^D", strict=True):
                m = result["methods"][method]
                gaps = [log_gap(gap) for gap in m["gap"]]
                panel.plot(
                    m[axis], gaps, marker=marker, markersize=3, label=f"{method}, end {m['log10_gap_at_end']:.1f}"
                )
            label = "passes over the data (gradient evaluations / n)" if axis == "passes" else "thresholdings"
            panel.set(xlabel=label, ylabel="log10 of the objective gap")
            panel.set_title(
                f"{result['problem']}{'-shaped (synthetic)' if result['synthetic'] else ''}, k = {result['settings']['k']}"
            )
            panel.grid(alpha=0.3)
            if axis == "thresholdings":
                panel.set_xscale("symlog", linthresh=10)
        row[0].legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--problem", nargs="+", default=list(SYNTHETIC), help="rcv1, epsilon, mnist or libsvm files")
    parser.add_argument("--k", nargs="+", type=int, default=[200, 500], help="entries kept of every weight vector")
    parser.add_argument("--passes", type=float, default=4, help="passes over the data per run, >= 1")
    parser.add_argument(
        "--batch_size", type=int, default=64, help="samples, fixed for SG-HT and SVRG-HT, first for HSG-HT and AHSG-HT"
    )
    parser.add_argument("--growth", type=float, default=0.01, help="k of s_t = s_0*(1+k)^t")
    parser.add_argument("--v", type=float, default=0.9, help="heavy-ball weight of AHSG-HT")
    parser.add_argument("--seed", type=int, default=0, help="of the synthetic data and of the mini-batches")
    parser.add_argument("--save_path", type=Path, default=Path("results/paper_convex"))
    args = parser.parse_args(argv)
    if args.passes < 1 or not math.isfinite(args.passes):
        raise UserError(f"--passes must be a number >= 1, got {args.passes:g}")
    if args.batch_size < 1:
        raise UserError(f"--batch_size must be >= 1, got {args.batch_size}")
    if not 0 < args.growth < 1:
        raise UserError(f"--growth must be between 0 and 1, got {args.growth:g}")
    if not 0 <= args.v < 1:
        raise UserError(f"--v must be in [0, 1), got {args.v:g}")
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    args = parse(argv)
    command = "python -m utils.paper_convex " + shlex.join(sys.argv[1:] if argv is None else argv)
    args.save_path.mkdir(parents=True, exist_ok=True)
    results = []
    for name in args.problem:
        problem = make_problem(name, args.seed)
        features = problem.features.shape[1]
        for k in args.k:
            if not 1 <= k <= features:
                raise UserError(f"--k {k}: must be in 1..{features}, the features of {name}")
        ours = []
        for k in args.k:
            print(
                f"{problem.name}: {len(problem.labels)} samples, {features} features, {problem.classes} weight vectors, k = {k}",
                flush=True,
            )
            ours.append(compare(problem, Settings(k, args.passes, args.batch_size, args.growth, args.v, args.seed)))
        with open(args.save_path / f"{problem.name}.json", "w", encoding="utf-8") as file:
            json.dump({"command": command.strip(), "results": ours}, file, indent=1)
        draw(ours, args.save_path / f"{problem.name}.png")
        results += ours
    text = table(results, command.strip())
    (args.save_path / "table.md").write_text(text, encoding="utf-8")
    print(text)
    return results


if __name__ == "__main__":
    run_main(main)
