"""utils.compare_tables: own runs grouped, intervals, what stands beside published rows, the generated files."""

import json
import math
import shlex

import numpy as np
import pytest
import torch
from scipy import stats

import cifar10_resnet_test
import imagenet_resnet_test
import models
from utils.base.errors import UserError
from utils.compare_tables import main
from utils.tables.compare import comparison_line, order, published_beside
from utils.tables.costs import papers_cut
from utils.tables.markdown import BEGIN, END, NONE_YET, make_report, readme_block, replace_block, update
from utils.tables.picture import panels_of
from utils.tables.published import PUBLISHED, read_published
from utils.tables.runs import ROOT, describe_source, find_runs, read_run
from utils.tables.statistics import half_width, half_width_of_difference
from utils.train.command_line import parse, resolve
from utils.train.options import identity, recipe_settings
from utils.train.report import pack_hits

SHORT = dict(epochs=10, schedule=[1, 3, 6, 8])


def layers(depth, rate):
    """The entry `filters` of results.json, for a CIFAR ResNet whose layers keep a share of their filters."""
    weights = [(name, list(w.shape)) for name, w in models.build(f"resnet{depth}").named_parameters() if w.ndim == 4]
    return [{"name": name, "shape": shape, "kept": rate * shape[0]} for name, shape in weights]


RESNET20 = layers(20, 0.7)


@pytest.fixture
def put(tmp_path):
    """put("name", recipe=..., last=...) writes a results.json as a run of ResNet-20 by that recipe does."""

    def write(name, recipe="prune", last=90.0, seed=1, changes=None, **settings):
        own = {**recipe_settings(recipe, "cifar10"), "manualSeed": seed, "data_path": f"/data/{name}", **settings}
        whole, small = {"multiply_adds": 40_551_040}, {"multiply_adds": 20_275_520}
        results = {
            **dict(finished=True, recipe=recipe, dataset="cifar10", synthetic_data=False, arch="resnet20", seed=seed),
            **dict(epochs_done=own["epochs"], epochs_run_here=own["epochs"], train_images=50_000, test_images=10_000),
            **dict(last_epoch_accuracy=last, best_epoch_accuracy=last + 0.5, prune_rate=round(1 - own["HTrate"], 12)),
            **dict(settings=own, command=f"python cifar10_resnet_test.py --name {name}", network=whole, seconds=600.0),
            **dict(small={"before": whole, "after": small} if own["HTrate"] < 1 else {}, filters=RESNET20),
            **(changes or {}),
        }
        if own.get("teacher"):
            results.setdefault("teacher", {"arch": "resnet56", "accuracy": 93.2, "sha256": "00"})
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))
        (folder / f"log_seed_{seed}.txt").write_text("log")
        return folder

    return write


def groups(folder):
    return find_runs([folder])[0]


def report(folder):
    return make_report(*find_runs([folder]), base=folder)


def test_the_interval_of_a_mean_adds_seeds_and_test_set():
    # By hand: variance over seeds 0.01/3 with 2 degrees of freedom, of the test set 91 * 9 / 10,000.
    seeds, total = 0.01 / 3, 0.01 / 3 + 0.0819
    expected = stats.t.ppf(0.975, total**2 / (seeds**2 / 2)) * math.sqrt(total)
    assert half_width([90.9, 91.0, 91.1], 10_000) == pytest.approx(expected)
    assert half_width([90.0, 91.0, 92.0], 10_000) == pytest.approx(stats.t.ppf(0.975, 2) / math.sqrt(3))
    # Without scatter over seeds the test set is left, whose variance is known.
    assert half_width([90.0, 90.0], 10_000) == pytest.approx(1.959964 * 0.3, abs=1e-6)
    assert half_width([90.0], 10_000) is None


def test_the_interval_of_a_difference_is_welchs_and_of_equal_seeds_paired():
    a, b, paired = {1: 90.0, 2: 91.0, 3: 92.5}, {4: 88.0, 5: 88.1}, {1: 89.0, 2: 90.1, 3: 91.4}
    many = 10**12  # images: no test-set part
    values = [list(one.values()) for one in (a, b, paired)]
    for other, test in ((b, stats.ttest_ind(*values[:2], equal_var=False)), (paired, stats.ttest_rel(*values[::2]))):
        interval = test.confidence_interval(0.95)
        assert half_width_of_difference(a, other, many) == pytest.approx((interval.high - interval.low) / 2, rel=1e-6)
    assert half_width_of_difference(a, paired, 10_000) > half_width_of_difference(a, paired, many)
    assert half_width_of_difference(a, {1: 90.0}, many) is None


def put_answers(put, right, flags, images="set"):
    """Runs of the seeds 1, 2, ... with these answers, bool (10,000,) each."""
    for seed, hits in enumerate(right, start=1):
        changes = {"test_hits": pack_hits(hits, images)}
        put(f"{len(flags)}{seed}", last=100 * hits.double().mean().item(), seed=seed, changes=changes, **flags)


def test_answers_paired_by_image_tell_apart_what_the_bound_cannot(put, tmp_path):
    base = torch.arange(10_000) >= 1000
    better = [base.clone(), base.clone(), base.clone()]
    for hits, (first, last) in zip(better, [(0, 37), (10, 50), (20, 63)], strict=True):
        hits[first:last] = True  # 37, 40 and 43 images more, the same ones otherwise
    put_answers(put, [base] * 3, {}), put_answers(put, better, {"no_regrow": True})
    (line,) = order(groups(tmp_path))
    by_image = 100 * torch.stack(better).double().mean(0).sub(base.double()).numpy()
    seeds, test = 0.03**2 / 3, by_image.var(ddof=1) / 10_000  # the three differences are 0.37, 0.40 and 0.43
    half = stats.t.ppf(0.975, (seeds + test) ** 2 / (seeds**2 / 2)) * math.sqrt(seeds + test)
    assert f"is ahead of AHSG-HT 30 %: +0.40 ± {half:.2f} (95 %, paired by image)" in line
    put_answers(lambda name, **rest: put(f"other/{name}", **rest), better, {"decay": 0.1}, images="other set")
    (tmp_path / "03/results.json").unlink()  # the seeds are not the same any more
    lines = order(groups(tmp_path))
    assert len(lines) == 3 and sum("paired by image" in line for line in lines) == 1


def test_the_test_set_never_makes_an_interval_narrower():
    a, b = {1: 91.0, 2: 91.5, 3: 90.5}, {1: 90.0, 2: 90.1, 3: 90.2}
    alone = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    by_image = np.repeat([0.3, 0.0, -0.3], 100)
    assert half_width_of_difference(a, b, 300, by_image) >= (alone.high - alone.low) / 2 - 1e-9


@pytest.mark.parametrize("text", ["x:AA==", "x:?", pack_hits(torch.zeros(10_000, dtype=torch.bool), "x")])
def test_answers_that_do_not_fit_their_run_are_damage(put, tmp_path, text):
    put("a", last=90.0, changes={"test_hits": text})
    assert groups(tmp_path) == [] and "is damaged and passed over" in find_runs([tmp_path])[1][0]


def test_order_needs_two_seeds_on_both_sides(put, tmp_path):
    for seed in (1, 2):
        put(f"base{seed}", "baseline", last=92.0 + 0.1 * seed, seed=seed)
        put(f"prune{seed}", last=88.0 + 0.1 * seed, seed=seed)
        put(f"free{seed}", last=88.1 + 0.1 * seed, seed=seed, no_regrow=True)
    put("one", last=95.0, k=None)
    first, *pairs = order(groups(tmp_path))
    assert "1 of 4 rows have one seed, so no order" in first and not any("95.00" in line for line in pairs)
    assert ["is ahead of" in line for line in pairs] == [True, True, False]


def test_published_rows_are_well_formed_and_complete_and_a_damaged_one_is_named(tmp_path):
    rows = read_published()
    assert len(rows) == len(set(rows)) == 88 and {row.init for row in rows} == {"scratch", "pretrained"}
    assert all(0 < row.acc < 100 and row.dataset and row.arch and row.method and row.source for row in rows)
    for old, new in ((",90.83,", ",ninety,"), (",90.83,0.31,42.2,FPGM-T1,", "")):
        (tmp_path / "published.csv").write_text(PUBLISHED.read_text().replace(old, new))
        with pytest.raises(UserError, match="damaged row, cifar10,resnet20,SFP"):
            read_published(tmp_path / "published.csv")


SCRATCH_30 = {("AHSG-HT+KD", 91.71), ("SFP", 90.83), ("FPGM-only", 91.09), ("SSL", 91.02)}
SCRATCH_40 = {("FPGM-only", 90.44), ("FPGM-mix", 91.99)}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (dict(), SCRATCH_30),
        (dict(HTrate=0.6), SCRATCH_40),
        (dict(started_from="x.th"), {("WHC", 91.62)}),
        (dict(recipe="prune_gradual"), SCRATCH_30 | SCRATCH_40),  # all within 8 points of 50.0 %
        (dict(recipe="prune_gradual", started_from="x.th"), {("WHC", 91.62), ("WHC", 90.72)}),
        (dict(recipe="baseline"), {("baseline", acc) for acc in (91.25, 92.20, 91.73, 92.60)}),
        (dict(recipe="baseline", widths_of="s.pth.tar"), set()),
    ],
)
def test_a_run_stands_beside_rows_that_began_alike_and_removed_as_much(put, tmp_path, run, expected):
    put("a", **run)
    (group,) = groups(tmp_path)
    assert {(row.method, row.acc) for row in published_beside(group.first, read_published())} == expected


def test_a_tied_network_stands_beside_as_many_filters_and_as_many_multiply_adds(put, tmp_path):
    """Widths 11/22/45 are 43.1 % by the formula, 51.8 % by count; WHC's rows are 42.2 and 54 % by the formula."""
    kept = [{**layer, "kept": {16: 11, 32: 22, 64: 45}[layer["shape"][0]]} for layer in layers(20, 1)]
    whole, small = {"multiply_adds": 40_551_040}, {"multiply_adds": 19_533_994}
    changes = dict(filters=kept, small={"before": whole, "after": small})
    put("tied", "prune_gradual", epochs=60, changes=changes, prune_begin=0, prune_end=0, **OF_TRAINED)
    text = report(tmp_path)
    assert "WHC 91.62 ± 0.14 (from 92.20, -42.2 %): **-1.62** at as many filters<br>" in text
    assert "WHC 90.72 (from 92.20, -54 %): **-0.72** at as many multiply-adds |" in text


def test_a_full_row_says_everything(put, tmp_path):
    folder = put("pruned", last=91.0, changes={"pieces": 3})
    timings = [dict(device="cpu", batch_size=b, speed_up=s) for b, s in ((128, 1.25), (1, 9.0))]
    (folder / "latency.resnet20.json").write_text(json.dumps({"timings": timings}))
    parts = ["SFP 90.83 ± 0.31 (-42.2 %, FPGM-T1): **+0.17**<br>", "91.00 (91.50)", "random weights"]
    parts += ["20.28 M (-50.0 %) | -42.2 %", "| 10, in 3 pieces, the last on ? of ? CPU cores |"]
    parts += ["9.00 / 1.25 (batch 1 / 128, cpu)"]
    text = report(tmp_path).split("\n## ")[0]
    assert all(part in text for part in [*parts, "[seed 1](pruned/log_seed_1.txt)"])


@pytest.mark.parametrize(
    ("changes", "settings", "remark"),
    [
        (dict(dataset="synthetic", synthetic_data=True), {}, "SYNTHETIC DATA"),
        (dict(epochs_run_here=10), {}, "10 epochs instead of 200"),
        (dict(epochs_run_here=39), dict(started_from="x.th"), "39 epochs instead of 40"),
        (dict(train_images=60, test_images=20), {}, "60 training, 20 test images"),
        (dict(dataset="folder"), {}, "own data"),
        (dict(epochs_run_here=40), dict(started_from="x.th"), ""),
        (dict(epochs_run_here=300), {}, ""),
    ],
)
def test_what_must_not_be_compared_is_not_subtracted(put, tmp_path, changes, settings, remark):
    put("pruned", changes=changes, **settings)
    (group,) = groups(tmp_path)
    assert group.first.remark == remark and ("| published |" in report(tmp_path)) == (not remark)


CUT = dict(began_cut=True, small={"before": {"multiply_adds": 40_551_040}, "after": {"multiply_adds": 20_275_520}})
OF_TRAINED = dict(started_from="x.th", learning_rate=0.05, warmup=0.0, HTrate=1.0, macs_cut=0.5)


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (dict(no_regrow=True), "AHSG-HT 30 %, no regrowth"),
        (dict(k=None), "AHSG-HT 30 %, fixed mini-batch"),
        (dict(v=0), "HSG-HT 30 %, no heavy ball"),
        (SHORT, "AHSG-HT 30 %"),
        (dict(HTrate=1.0), "heavy ball, unpruned"),
        (dict(recipe="distill", teacher="t"), "unpruned+KD"),
        (dict(recipe="finetune"), "AHSG-HT, fine-tuned 30 %"),
        (dict(recipe="finetune", HTrate=1.0, v=0.0, changes=CUT), "cut network, fine-tuned, no heavy ball"),
        (dict(changes=CUT), "AHSG-HT 30 % of a cut network"),
        (dict(recipe="prune_gradual", changes=dict(arithmetic="TF32, 2 processes")), "gradual 30 %, TF32, 2 processes"),
        (dict(recipe="prune_gradual", prune_begin=0, prune_end=0, **OF_TRAINED), "one-shot 50 % of multiply-adds"),
        (
            dict(recipe="prune_gradual", prune_begin=0.05, prune_end=0.5, **OF_TRAINED),
            "gradual 50 % of multiply-adds, prune_begin 0.05, prune_end 0.5",
        ),
        (dict(recipe="baseline", widths_of="x"), "small network from scratch, of unknown"),
    ],
)
def test_what_a_run_is_follows_from_settings_not_from_folder_names(put, tmp_path, run, name):
    folder = put("baseline", **run)
    assert groups(tmp_path)[0].first.name == describe_source(f"{folder}/small.resnet20.pth.tar") == name


def test_imagenets_usual_size_of_images_is_not_spoken_of(put):
    for dataset, size, spoken in (("imagenet", 224, False), ("imagenet", 64, True), ("folder", 224, True)):
        run = read_run(put(f"{dataset}{size}", changes=dict(dataset=dataset), image_size=size) / "results.json")
        assert (f"image_size {size}" in run.name) == (f"--image_size {size}" in run.command) == spoken


def test_runs_are_pooled_when_they_differ_by_seed_and_place_only_and_the_rest_is_named(put, tmp_path):
    put("a", seed=1, workers=0)
    put("b", seed=2, workers=4, save_path="elsewhere")
    put("c", seed=3, decay=1e-4)
    for seed, changes in (
        (4, {"arithmetic": "bfloat16"}),
        (5, {"arithmetic": "TF32"}),
        (6, {"arithmetic": "float32, 2 processes"}),
    ):
        put(f"d{seed}", seed=seed, changes=changes)
    for seed, sha in ((7, "00"), (8, "00"), (9, "11")):
        teacher = {"arch": "resnet56", "accuracy": 93.2, "sha256": sha}
        put(f"t{seed}", "prune_distill", seed=seed, teacher=f"{seed}.tar", changes={"teacher": teacher})
    for seed, left in ((10, 20_000_000), (11, 20_000_000), (12, 21_000_000)):
        small = {"before": {"multiply_adds": 40_551_040}, "after": {"multiply_adds": left}}
        put(f"cut{seed}", seed=seed, changes=dict(began_cut=True, small=small))
    put("u", last=80.0)
    put("v", seed=2, changes=dict(finished=False, epochs_done=20))
    found, notes = find_runs([tmp_path])
    assert sorted(tuple(group.last) for group in found) == [
        (1, 2),
        (3,),
        (4,),
        (5,),
        (6,),
        (7, 8),
        (9,),
        (10, 11),
        (12,),
    ]
    assert "u repeats seed 1 (80.00 %)" in notes[0] and "20 of 200 epochs" in notes[1]


DAMAGE = ["{", "[1]", "[" * 100_000, b"\xff\xfe", {"last_epoch_accuracy": None}, {"last_epoch_accuracy": 900.0}]
DAMAGE += [{"last_epoch_accuracy": math.nan}, {"recipe": "none"}, {"seed": []}, {"small": {"after": "few"}}]


@pytest.mark.parametrize("content", DAMAGE)
def test_damaged_results_are_named_and_passed_over(put, tmp_path, content):
    put("good")
    file = put("bad", seed=2) / "results.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(file.read_text()), **content})
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    (group,), (note,) = find_runs([tmp_path])
    assert len(group.runs) == 1 and "bad is damaged and passed over: " in note


def test_committed_runs_are_readable():
    runs = {run.folder.name: run for group in groups(ROOT / "results/cpu-10-epochs") for run in group.runs}
    assert len(runs) == 9 and runs["prune"].costs.left == 21_420_768 and runs["baseline"].costs.full == 40_551_040
    assert (
        runs["prune"].speed_up == "1.10 / 1.58 (batch 1 / 128, cpu)"
        and runs["prune_distill"].teacher == "resnet20 of 91.71 %"
    )


def test_the_printed_commands_give_the_settings_of_the_committed_runs():
    """However a run was continued: from the command itself, trained starts and other defaults of its day included."""
    more = ("epochs", "manualSeed", "teacher", "widths_of", "compile", "tf32", "arch", "arch_small", "dataset")
    runs = [run for group in groups(ROOT / "results") for run in group.runs]
    for run in runs:
        script = imagenet_resnet_test if run.dataset == "imagenet" else cifar10_resnet_test
        given = parse(script.parser(), shlex.split(run.command)[2:])
        family = "imagenet" if run.dataset == "imagenet" else "cifar"
        settings = vars(resolve(given, {}, family=family, arch=script.ARCH))
        assert identity(settings) == identity(run.settings), run.folder
        assert {n: settings.get(n) for n in more} == {n: run.settings.get(n) for n in more}, run.folder
        assert given.get("resume") == run.settings.get("started_from")
    assert len(runs) > 50


def test_the_picture_has_own_networks_by_count_and_by_the_papers_formula():
    (points,) = panels_of(groups(ROOT / "results/from-random-200-epochs/A"), read_published()).values()
    (own,), (sfp, *_) = ([p for p in points if p.is_own], [p for p in points if p.label.startswith("SFP")])
    assert own.accuracy == pytest.approx(90.5) and own.macs == pytest.approx(22.38, abs=0.01)
    assert own.formula == pytest.approx(sfp.macs, abs=0.02) and sfp.formula is None, "as many filters as in SFP"


@pytest.mark.parametrize(("settings", "flag"), [(dict(amp=False), "--no_amp"), (dict(amp=False, tf32=True), "--tf32")])
def test_a_printed_command_keeps_the_number_format(put, settings, flag):
    """A GPU's default is bfloat16."""
    words = read_run(put("a", **settings) / "results.json").command.split()
    assert [word for word in words if word in ("--no_amp", "--tf32", "--amp")] == [flag]


@pytest.mark.parametrize(
    ("depth", "cuts"), [(20, (42.2, 54)), (32, (41.5, 53.2)), (56, (41.1, 52.6)), (110, (40.8, 52.3))]
)
def test_the_papers_formula_gives_the_papers_cuts_by_rate_and_by_layer(depth, cuts):
    for rate, cut in zip((0.7, 0.6), cuts, strict=True):
        by_layer, by_rate = papers_cut(layers(depth, rate)), papers_cut(layers(depth, 0.1), rate)
        assert round(100 * by_rate, 1) == cut and by_layer == pytest.approx(by_rate)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "90.00 (last epoch); published, top-1 %: AHSG-HT+KD 91.71"),
        (dict(epochs_run_here=5), "90.00 (last epoch), NOT COMPARABLE: 5 epochs instead of 200; published"),
        (dict(synthetic_data=True), "none, the data is SYNTHETIC"),
        (dict(settings={"widths_of": "small.resnet20.pth.tar"}), "none, they have no small network"),
        (dict(prune_rate=0.65, small={}), "none, no published row like resnet20 AHSG-HT 65 %, 200 epochs from random"),
    ],
)
def test_the_line_after_training(put, changes, expected):
    results = json.loads((put("a") / "results.json").read_text())
    assert expected in comparison_line({**results, **changes})


@pytest.mark.parametrize("content", [None, "method\nx\n", b"\xff\xfe"])
def test_a_run_without_the_published_rows_ends_well(put, monkeypatch, tmp_path, content):
    results = json.loads((put("a") / "results.json").read_text())
    file = tmp_path / "rows.csv"
    if content:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr("utils.tables.published.PUBLISHED", file)
    line = comparison_line(results)
    assert line.startswith("comparison with the papers: none, ") and "rows.csv'" in line


def test_a_damaged_latency_file_costs_no_row(put, tmp_path):
    (put("a") / "latency.resnet20.json").write_text("[")
    (group,) = groups(tmp_path)
    assert group.first.speed_up == "'latency.resnet20.json' is damaged"


def test_runs_on_other_images_or_from_other_networks_are_no_seeds_of_each_other(put, tmp_path):
    hits = np.arange(10_000) < 9_000
    for name in ("cats", "dogs"):
        hits_of = pack_hits(torch.from_numpy(hits), (name * 12)[:12])
        put(name, changes={"dataset": "folder", "test_hits": hits_of}, dataset="folder")
        put(f"from {name}", "prune_gradual", started_from=f"runs/{name}/checkpoint.resnet20.pth.tar")
    assert len(groups(tmp_path)) == 4
    assert {group.first.started_from for group in groups(tmp_path)} >= {"trained cats/checkpoint.resnet20.pth.tar"}


def test_damaged_or_missing_results_are_named_before_anything_is_written(put, tmp_path):
    (tmp_path / "README.md").write_text(f"{BEGIN}\nkept\n{END}\n")
    put("results/a")
    (put("results/b") / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results/b is damaged.*nothing has been written"):
        update(tmp_path)
    for name in "ab":
        (tmp_path / "results" / name / "results.json").unlink()
    with pytest.raises(UserError, match=r"no results\.json"):
        update(tmp_path)
    assert "kept" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("name", "message"), [("a.jpg", "must end in .png"), ("a.png", "nothing to draw")])
def test_a_picture_overwrites_nothing_else_and_is_never_left_out_silently(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        main([str(tmp_path), "--picture", str(tmp_path / name)])
    assert not list(tmp_path.iterdir())


def test_update_writes_report_picture_and_the_readmes_block(put, tmp_path):
    put("results/full", last=91.0, no_regrow=True)
    put("results/short", last=70.0, **SHORT)
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nPAST\n{END}\nafter\n")
    (tmp_path / "results/notes.md").write_text("## By hand\n\nStays | as it is.\n")
    update(tmp_path)
    text, readme = (tmp_path / "results/README.md").read_text(), (tmp_path / "README.md").read_text()
    first, rest = text.split("## By hand\n\nStays | as it is.\n")
    assert "91.00 (91.50)" in first and "(full/log_seed_1.txt)" in first and "70.00 (70.50)" in rest
    assert "![accuracy against multiply-adds](accuracy.png)" in first
    assert "- full: `python cifar10_resnet_test.py DATA --recipe prune --no_regrow`\n" in rest
    assert "- short: `python cifar10_resnet_test.py DATA --recipe prune --schedule 1 3 6 8 --epochs 10`" in rest
    assert readme.startswith(f"before\n{BEGIN}\n") and readme.endswith(f"{END}\nafter\n") and "PAST" not in readme
    assert "91.00 (91.50)" in readme and "70.00" not in readme
    assert (tmp_path / "results/accuracy.png").read_bytes().startswith(b"\x89PNG")
    update(tmp_path)
    assert (tmp_path / "results/README.md").read_text() == text and (tmp_path / "README.md").read_text() == readme
    for text in ("", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {END}"):
        with pytest.raises(UserError, match="once each"):
            replace_block(text, "block")


def test_the_readme_shows_recipes_as_they_are_until_there_is_a_full_run(put, tmp_path):
    put("short", **SHORT), put("other", decay=0.1, **SHORT), put("own data", changes={"train_images": 60}, **SHORT)
    block = readme_block(groups(tmp_path))
    rows = [line for line in block.splitlines() if line.startswith("| resnet20")]
    assert len(rows) == 1 and "AHSG-HT 30 %" in rows[0] and "full length (not run): AHSG-HT+KD 91.71" in rows[0]
    assert NONE_YET in block
    put("full")
    block = readme_block(groups(tmp_path))
    assert NONE_YET not in block and block.count("| resnet20") == 1 and "not run" not in block
    put("better", last=91.0, decay=0.1), put("another method", "prune_gradual", last=80.0)
    block = readme_block(groups(tmp_path))
    assert block.count("| resnet20") == 2 and "| 91.00 (" in block and "| 80.00 (" in block, "the best of each method"


def test_the_committed_reports_are_those_of_the_committed_results():
    found, notes = find_runs([ROOT / "results"])
    by_hand = (ROOT / "results/notes.md").read_text()
    report = make_report(found, notes, base=ROOT / "results", by_hand=by_hand, picture="accuracy.png")
    assert (ROOT / "results/README.md").read_text() == report, "renew it: python -m utils.compare_tables --update"
    assert readme_block(found) in (ROOT / "README.md").read_text()


def test_the_command_prints_the_tables(put, tmp_path, capsys):
    put("a", "prune_distill", teacher="t", changes={"teacher": {"arch": "a | b\nc", "accuracy": 90.0}})
    main([str(tmp_path), "--picture", str(tmp_path / "a.png")])
    rows = [line.replace("\\|", "") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and len({row.count("|") for row in rows}) == 1 and (tmp_path / "a.png").exists()
    with pytest.raises(UserError, match="'nowhere' is no folder"):
        main(["nowhere"])
