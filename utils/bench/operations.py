"""Time per kind of tensor operation in a training loop: the part of utils.bench.training behind --operations."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

from utils.bench.loops import LoopProcess, Setup

# Operations with a smaller share of the time are added up.
SMALLEST_SHARE = 0.01


def time_operations(setups: list[Setup], rounds: int) -> list[dict]:
    """Milliseconds per mini-batch of some loops, medians over the rounds, in which they take turns, unwatched and watched.

    Of each {"loop", "step_ms" unwatched, "images" per mini-batch, "watched_ms", "matmul_flops", "copy_bytes", "operations": [{"name", "calls", "ms"}], slowest first}.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(LoopProcess(setup)) for setup in setups]
        for process in processes:
            process.call("train")
        taken = [[(process.call("train"), process.call("watch")) for process in processes] for _ in range(rounds)]
        peaks = [(process.call("matmul_flops"), process.call("copy_bytes")) for process in processes]
    return [
        per_step(setup, *zip(*own, strict=True), *peak)
        for setup, own, peak in zip(setups, zip(*taken, strict=True), peaks, strict=True)
    ]


def per_step(setup: Setup, plain: Sequence[dict], watched: Sequence[dict], flops: float, bandwidth: float) -> dict:
    """One loop's rounds, unwatched and watched, as time_operations gives them."""
    steps = watched[0]["steps"]

    def milliseconds(seconds: Iterable[float]) -> float:
        return 1000 * statistics.median(seconds) / steps

    absent = {"calls": 0, "seconds": 0.0}
    rows = [
        {
            "name": name,
            "calls": watched[0]["operations"].get(name, absent)["calls"] / steps,
            "ms": milliseconds(one["operations"].get(name, absent)["seconds"] for one in watched),
        }
        for name in sorted(set().union(*(one["operations"] for one in watched)))
    ]
    return {
        "loop": setup.label,
        "step_ms": milliseconds(one["seconds"] for one in plain),
        "images": statistics.median(one["images"] for one in plain) / steps,
        "watched_ms": milliseconds(one["seconds"] for one in watched),
        "matmul_flops": flops,
        "copy_bytes": bandwidth,
        "operations": sorted(rows, key=lambda row: -row["ms"]),
    }


def operations_table(results: list[dict], flops: dict[str, int], heading: str) -> str:
    """The timings as Markdown, one part per loop.

    Args:
        flops: {name of an operation: its floating-point operations per image}, for those where they are known. Here convolutions
            are credited with the last layer's products too, and with a gradient for the images: together below 1 %.
    """
    lines = [heading]
    for result in results:
        total = sum(row["ms"] for row in result["operations"])
        lines += [
            "",
            f"{result['loop']}: {result['step_ms']:.1f} ms per mini-batch; watched {result['watched_ms']:.1f} ms, of which operations {total:.1f} ms; "
            f"a matrix product reaches {result['matmul_flops'] / 1e9:.0f} GFLOP/s here, a copy {result['copy_bytes'] / 1e9:.0f} GB/s",
            "",
            "| operation | calls | ms | share | of matmul FLOP/s |",
            "|---|---|---|---|---|",
        ]
        small = [row for row in result["operations"] if row["ms"] < SMALLEST_SHARE * total]
        for row in result["operations"][: len(result["operations"]) - len(small)]:
            done = flops.get(row["name"], 0) * result["images"]
            reached = f"{100 * done / (row['ms'] / 1000) / result['matmul_flops']:.0f} %" if done else "-"
            lines.append(
                f"| {row['name'].removeprefix('aten::')} | {row['calls']:.0f} | {row['ms']:.1f} | {100 * row['ms'] / total:.1f} % | {reached} |"
            )
        if small:
            ms = sum(row["ms"] for row in small)
            lines.append(
                f"| {len(small)} more | {sum(row['calls'] for row in small):.0f} | {ms:.1f} | {100 * ms / total:.1f} % | - |"
            )
    return "\n".join(lines) + "\n"
