"""What the heavy ball is worth on an ill-conditioned quadratic with thresholding.

    python -m utils.heavy_ball [--save_path results/heavy_ball]

Counts the iterations of AHSG_HT on f(x) = (x - x*)^T Q (x - x*)/2 with eigenvalues of Q from 1 to kappa and a sparse x*, of which
the relaxed half of the entries is kept (unit="element"), until |x - x*| <= 1e-6 |x*|. Polyak's theory gives the step sizes:

    v = 0: lr = 2/(1 + kappa);        heavy ball: lr = 4/(1 + sqrt(kappa))^2, v = ((sqrt(kappa) - 1)/(sqrt(kappa) + 1))^2
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from AHSG_HT import AHSG_HT
from utils.errors import run_main
from utils.options import OneLineParser

KAPPAS = (10, 100, 1000)
FEATURES = 100
RELEVANT = 10
TOLERANCE = 1e-6
LIMIT = 50_000


def theory(kappa: float) -> tuple[float, float]:
    """(lr, v) of the heavy ball for eigenvalues 1 to kappa."""
    root = math.sqrt(kappa)
    return 4 / (1 + root) ** 2, ((root - 1) / (root + 1)) ** 2


def iterations(kappa: float, lr: float, v: float, heavy_ball: str = "paper", seed: int = 0) -> int | None:
    """Iterations from x = 0 to the tolerance; None where LIMIT does not suffice."""
    generator = torch.Generator().manual_seed(seed)
    draw = dict(generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES, **draw)).Q
    hessian = basis * torch.logspace(0, math.log10(kappa), FEATURES, dtype=torch.float64) @ basis.T
    target = torch.zeros(FEATURES, dtype=torch.float64)
    target[torch.randperm(FEATURES, generator=generator)[:RELEVANT]] = torch.randn(RELEVANT, **draw)
    x = torch.zeros(FEATURES, dtype=torch.float64, requires_grad=True)
    optimizer = AHSG_HT([x], lr=lr, v=v, HTrate=0.5, heavy_ball=heavy_ball, unit="element")
    for t in range(1, LIMIT + 1):
        x.grad = hessian @ (x.detach() - target)
        optimizer.update_HSG(1)
        optimizer.step()
        if torch.linalg.vector_norm(x.detach() - target) <= TOLERANCE * torch.linalg.vector_norm(target):
            return t
    return None


def measure(kappa: float, seed: int = 0) -> dict:
    """Iterations without a heavy ball, with the paper's and with the released one, for one kappa."""
    lr, v = theory(kappa)
    plain_lr = 2 / (1 + kappa)
    return {
        "kappa": kappa,
        "v": v,
        "seed": seed,
        "v_0": iterations(kappa, plain_lr, 0.0, seed=seed),
        "paper": iterations(kappa, lr, v, seed=seed),
        # At the step size of v = 0: the released term is zero, so nothing may change.
        "released": iterations(kappa, plain_lr, v, "released", seed=seed),
    }


def table(rows: list[dict]) -> str:
    """The counts as Markdown."""
    lines = [
        "# Heavy ball on a thresholded quadratic: iterations to 1e-6",
        "",
        f"`python -m utils.heavy_ball`: {FEATURES} entries, {RELEVANT} of them relevant, {FEATURES // 2} kept; seeds "
        f"{', '.join(str(seed) for seed in sorted({row['seed'] for row in rows}))}. `released` runs with the v of the theory.",
        "",
        "| kappa | seed | theory's v | v = 0 | paper | released | v = 0 / paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        counts = [row[name] if row[name] is not None else f"> {LIMIT}" for name in ("v_0", "paper", "released")]
        ratio = f"{row['v_0'] / row['paper']:.1f}" if row["v_0"] and row["paper"] else ""
        lines.append(f"| {row['kappa']} | {row['seed']} | {row['v']:.3f} | {' | '.join(map(str, counts))} | {ratio} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> list[dict]:
    parser = OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--save_path", type=Path, help="folder for table.md and heavy_ball.json")
    args = parser.parse_args(argv)
    rows = [measure(kappa, seed) for kappa in KAPPAS for seed in range(3)]
    print(table(rows))
    if args.save_path:
        args.save_path.mkdir(parents=True, exist_ok=True)
        (args.save_path / "table.md").write_text(table(rows), encoding="utf-8")
        (args.save_path / "heavy_ball.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return rows


if __name__ == "__main__":
    run_main(main)
