"""Published rows and groups of own runs in one shape, with every difference computed."""

from __future__ import annotations

from dataclasses import dataclass

from utils.compare.order import with_spread
from utils.compare.own_runs import Group, init
from utils.compare.published import Published, published_baseline, published_rows


@dataclass(frozen=True)
class Row:
    """A published row or a group of own runs. Accuracies, changes and cuts in %; None where there is none.

    Attributes:
        kind: published or own.
        pruned: share of the filters removed per layer.
        accuracy: as published; of own runs the last epoch's, mean over seeds.
        baseline, change: the unpruned accuracy that the row is measured against, and the difference: of a published row its source's,
            of an own row that of own runs of the same length.
        change_published: less the published baseline; only of rows that may be compared.
        cut_formula, cut_count: multiply-adds saved, as the source or soft filter pruning's formula says and as counted.
        marks: doubts of a published row; why an own one must not be compared.
    """

    kind: str
    dataset: str
    arch: str
    method: str
    pruned: float | None
    init: str
    recipe: str
    seeds: str
    accuracy: float
    std: float | None
    interval_low: float | None
    interval_high: float | None
    best_epoch_accuracy: float | None
    baseline: float | None
    change: float | None
    change_published: float | None
    multiply_adds: int | None
    cut_count: float | None
    cut_formula: float | None
    parameters: int | None
    speed_up: str
    marks: str
    commands: str
    logs: str


def published_row(row: Published) -> Row:
    return Row(
        **dict(
            kind="published", dataset=row.dataset, arch=row.arch, method=row.method, pruned=row.pruned, init=row.init
        ),
        **dict(recipe=row.source, seeds="", accuracy=row.acc, std=row.acc_std, interval_low=None, interval_high=None),
        **dict(best_epoch_accuracy=None, baseline=row.baseline_acc, change=row.change, change_published=None),
        **dict(multiply_adds=None, cut_count=None, cut_formula=row.macs_cut, parameters=None, speed_up=""),
        **dict(marks=row.doubt, commands="", logs=""),
    )


def own_row(group: Group, groups: list[Group], published: list[Published]) -> Row:
    """A group of own runs; its baseline is looked for among `groups`."""
    summary, costs, first = group.summary, group.costs, group.first
    baseline, note = own_baseline(group, groups)
    base = None if baseline is None else baseline.summary.mean
    theirs = None if group.marks else published_baseline(published, first["dataset"], first["arch"])
    low, high = summary.interval or (None, None)
    speeds = [f"{run.results['seed']}: {at} {s:.2f}" for run in group.runs for at, s in run.speed_ups().items()]
    return Row(
        **dict(kind="own", dataset=first["dataset"], arch=first["arch"], method=group.method),
        pruned=None if group.is_small else 100 * first["prune_rate"],
        init=init(first),
        recipe=group.recipe,
        seeds=" ".join(str(run.results["seed"]) for run in group.runs),
        **dict(accuracy=summary.mean, std=summary.std, interval_low=low, interval_high=high),
        best_epoch_accuracy=sum(group.best()) / summary.n,
        **dict(baseline=base, change=None if base is None or baseline is group else summary.mean - base),
        change_published=None if theirs is None else summary.mean - theirs[0],
        **dict(
            multiply_adds=costs.multiply_adds, cut_count=_percent(costs.cut), cut_formula=_percent(costs.formula_cut)
        ),
        **dict(parameters=costs.parameters, speed_up="; ".join(speeds)),
        marks="; ".join(part for part in (group.marks, note) if part),
        commands="; ".join(run.command for run in group.runs),
        logs="; ".join(run.log for run in group.runs),
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def own_baseline(group: Group, groups: list[Group]) -> tuple[Group | None, str]:
    """The unpruned network's runs on the same images with the same epochs and learning rates; and a note.

    Of several the one with the same number format and, then, the same mini-batches; a note tells of another number format. Two full
    recipes that differ in length (prune_distill has 250 epochs, the baseline 200) are compared too, with a note that says so.
    """
    # A network that began with trained weights is measured against those that did not, too.
    baselines = [
        other for other in groups if other.method == "baseline" and other.kind == (*group.kind[:-1], "scratch")
    ]
    baselines.sort(key=lambda other: (other.arithmetic != group.arithmetic, other.schedule != group.schedule))
    equal = [other for other in baselines if other.length == group.length]
    full = [other for other in baselines if not other.marks and not group.marks]
    if not equal and not full:
        return None, ""
    other = (equal or full)[0]
    notes = [] if equal else [f"baseline of {other.epochs} epochs"]
    if other.arithmetic != group.arithmetic:
        notes.append(f"baseline in {other.arithmetic}")
    return other, ", ".join(notes)


def make_rows(groups: list[Group], published: list[Published], *, every: bool = False) -> list[Row]:
    """All rows by data set, network, rate and method, published before own.

    Args:
        every: also published rows of networks that have no own run.
    """
    rows = [own_row(group, groups, published) for group in groups]
    here = {(row.dataset, row.arch) for row in rows}
    rows = [published_row(row) for row in published if every or not rows or (row.dataset, row.arch) in here] + rows
    # None: a rate that no single figure tells, after all others.
    return sorted(rows, key=lambda row: (row.dataset, _depth(row.arch), row.pruned is None, row.pruned or 0))


def _depth(arch: str) -> tuple:
    digits = "".join(filter(str.isdigit, arch))
    return arch.rstrip("0123456789"), int(digits) if digits else 0


def against_published(groups: list[Group]) -> list[str]:
    """A line per own group that may be compared: its difference to every published row of the same network and rate."""
    lines = []
    for group in groups:
        first = group.first
        rows = published_rows(first["dataset"], first["arch"], first["prune_rate"], init(first))
        if group.marks or group.is_small or not rows:
            continue
        own = f"{first['arch']} {group.method} {100 * first['prune_rate']:g} %, {with_spread(group)}"
        differences = [
            f"{group.summary.mean - row.acc:+.2f} to {row.method} {row.acc:.2f} ({row.source})" for row in rows
        ]
        lines.append(f"{own}: {', '.join(differences)}")
    return lines
