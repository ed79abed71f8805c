"""Time per kind of tensor operation in a training loop: the part of utils.bench_training behind --operations."""

from __future__ import annotations

import statistics

from utils.bench_loops import LoopProcess, Setup

# Operations with a smaller share of the time are added up.
SMALLEST_SHARE = 0.01


def time_operations(setup: Setup, rounds: int) -> dict:
    """Milliseconds per mini-batch of one loop, medians over the rounds, which take turns unwatched and watched.

    {"loop", "step_ms" unwatched, "watched_ms", "matmul_flops", "copy_bytes", "operations": [{"name", "calls", "ms"}], slowest first}.
    """
    with LoopProcess(setup) as process:
        process.call("train")
        plain, watched = [], []
        for _ in range(rounds):
            plain.append(process.call("train"))
            watched.append(process.call("watch"))
        peak, bandwidth = process.call("matmul_flops"), process.call("copy_bytes")
    steps = watched[0]["steps"]
    names = watched[0]["operations"]
    per_step = {
        name: 1000
        * statistics.median(one["operations"].get(name, {"seconds": 0})["seconds"] for one in watched)
        / steps
        for name in names
    }
    return {
        "loop": setup.label,
        "step_ms": 1000 * statistics.median(one["seconds"] for one in plain) / steps,
        "watched_ms": 1000 * statistics.median(one["seconds"] for one in watched) / steps,
        "matmul_flops": peak,
        "copy_bytes": bandwidth,
        "operations": [
            {"name": name, "calls": names[name]["calls"] / steps, "ms": per_step[name]}
            for name in sorted(names, key=per_step.get, reverse=True)
        ],
    }


def operations_table(results: list[dict], flops: dict[str, int], heading: str) -> str:
    """The timings as Markdown, one part per loop.

    Args:
        flops: {name of an operation: its floating-point operations per mini-batch}, for those where they are known.
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
            done = flops.get(row["name"])
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
