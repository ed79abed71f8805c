"""utils.compare_tables: own runs read and grouped, statistics over seeds, what must not be compared, the README's table."""

import csv
import io
import json
import math
import shutil

import pytest
from scipy import stats

from utils import compare_tables
from utils.base.errors import UserError
from utils.compare.order import order
from utils.compare.own_runs import find_runs, group_runs
from utils.compare.published import published_baseline, read_published
from utils.compare.rows import make_rows
from utils.compare.statistics import half_width_of_difference, summarise
from utils.compare_tables import RESULTS, ROOT, main, readme_block, replace_block, report
from utils.small.counts import papers_cut
from utils.train.recipes import RECIPES

WHOLE = {"multiply_adds": 40_551_040, "parameters": 269_722}


@pytest.fixture
def put(tmp_path):
    """put("name", recipe=..., last=...) writes a results.json as a run of ResNet-20 does; settings are those of the recipe."""

    def write(name, recipe="prune", last=90.0, seed=1, changes=None, **settings):
        own = {**RECIPES[recipe], "manualSeed": seed, "data_path": f"/data/{name}", **settings}
        results = {
            **dict(
                finished=True, recipe=recipe, dataset="cifar10", synthetic_data=False, arch="resnet20", num_classes=10
            ),
            **dict(seed=seed, epochs_done=own["epochs"], epochs_run_here=own["epochs"], train_images=50_000),
            **dict(test_images=10_000, last_epoch_accuracy=last, best_epoch_accuracy=last + 0.5, HTrate=own["HTrate"]),
            **dict(prune_rate=round(1 - own["HTrate"], 12), settings=own, command=f"python train.py --name {name}"),
            "filters": [{"name": "conv_1_3x3.weight", "shape": [16, 3, 3, 3], "kept_indices": list(range(16))}],
            **({"small": {"before": WHOLE, "after": {"multiply_adds": 20_275_520, "parameters": 134_861}}}),
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


def groups_of(folder):
    runs, notes = find_runs([folder])
    groups, repeats = group_runs(runs)
    return groups, notes + repeats


def own_rows(folder):
    return [row for row in make_rows(groups_of(folder)[0], read_published()) if row.kind == "own"]


def test_mean_deviation_and_t_interval_over_seeds(put, tmp_path):
    for seed, last in ((1, 90.0), (2, 91.0), (3, 92.0)):
        put(f"s{seed}", last=last, seed=seed)
    (row,) = own_rows(tmp_path)
    # By hand: mean 91, standard deviation 1, t(0.975, 2) = 4.30265, 4.30265 / sqrt(3) = 2.48414.
    assert (row.accuracy, row.std, row.seeds) == (91, 1, "1 2 3")
    assert (row.interval_low, row.interval_high) == (
        pytest.approx(91 - 2.48414, abs=1e-5),
        pytest.approx(93.48414, abs=1e-5),
    )
    assert row.best_epoch_accuracy == 91.5
    assert row.interval_high - row.accuracy == pytest.approx(stats.t.interval(0.95, 2, 91, 1 / math.sqrt(3))[1] - 91)


def test_one_seed_has_no_interval():
    assert summarise([90.0]).interval is None and half_width_of_difference([90.0], [91.0]) is None


def test_a_single_seed_is_taken_to_spread_as_the_others_do():
    # By hand: t(0.975, 2) = 4.30265, standard deviation 1, sqrt(1 + 1/3) = 1.15470.
    assert half_width_of_difference([90.0], [90.0, 91.0, 92.0]) == pytest.approx(4.30265 * 1.15470, abs=1e-4)
    assert half_width_of_difference([91.0, 92.0, 90.0], [80.0]) == pytest.approx(4.96828, abs=1e-4)


def test_the_interval_of_a_difference_is_welchs():
    a, b = [90.0, 91.0, 92.5], [88.0, 88.1]
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert half_width_of_difference(a, b) == pytest.approx((interval.high - interval.low) / 2)


def test_full_recipes_are_set_against_own_and_published_baselines(put, tmp_path):
    put("base", "baseline", last=92.0)
    put("pruned", "prune", last=91.0)
    base, pruned = own_rows(tmp_path)
    assert (pruned.baseline, pruned.change) == (92.0, -1.0) and base.change is None
    # FPGM's table, that most published rows are measured against, has 92.20.
    assert pruned.change_published == pytest.approx(91.0 - 92.20)
    assert (pruned.cut_count, pruned.multiply_adds, pruned.parameters) == (50.0, 20_275_520, 134_861)
    assert pruned.cut_formula == pytest.approx(42.2, abs=0.05)
    text = report([tmp_path], "text")[0]
    assert "+0.17 to SFP 90.83 (FPGM-T1), -0.09 to FPGM-only 91.09" in text and "NOT" not in text


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        (dict(dataset="synthetic", synthetic_data=True), "SYNTHETIC DATA"),
        (dict(epochs_run_here=10), "10 epochs instead of 200"),
        (dict(epochs_run_here=400), "400 epochs instead of 200"),
        (dict(train_images=60, test_images=20), "60 training and 20 test images"),
        (dict(dataset="folder"), "own data"),
    ],
)
def test_what_must_not_be_compared_is_marked_and_not_compared(put, tmp_path, changes, mark):
    put("base", "baseline", last=92.0)
    put("pruned", "prune", last=91.0, changes=changes)
    row = next(row for row in own_rows(tmp_path) if row.method == "AHSG-HT")
    assert mark in row.marks and row.change_published is None
    if "epochs" not in mark:
        assert row.change is None
    assert "to SFP" not in report([tmp_path], "text")[0]


def test_a_short_run_has_the_baseline_of_its_own_length_only(put, tmp_path):
    short = dict(epochs=10, schedule=[1, 3, 6, 8])
    put("base", "baseline", last=92.0)
    put("pruned", "prune", last=75.0, **short)
    assert next(row for row in own_rows(tmp_path) if row.method == "AHSG-HT").change is None
    put("short base", "baseline", last=83.0, **short)
    assert next(row for row in own_rows(tmp_path) if row.method == "AHSG-HT").change == -8.0


def test_full_recipes_of_other_lengths_are_compared_with_a_note(put, tmp_path):
    put("base", "baseline", last=92.0)
    put("distilled", "prune_distill", last=91.5, teacher="t.pth.tar")
    row = next(row for row in own_rows(tmp_path) if row.method == "AHSG-HT+KD")
    assert row.change == -0.5 and "baseline of 200 epochs" in row.marks and "resnet56 of 93.20 %" in row.recipe


def test_method_and_recipe_follow_from_settings_not_from_folder_names(put, tmp_path):
    put("c1/prune", "baseline")
    put("c2/baseline", "prune", threshold_every="epoch")
    put("c3", "prune", heavy_ball="released")
    put("c4", "prune", k=None)
    put("c5", "prune", v=0)
    put("c6", "prune")
    put("c7", "baseline", widths_of="nowhere/small.resnet20.pth.tar", changes={"network": WHOLE})
    put("c8", "distill", teacher="t")
    put("c9", "finetune")
    found = {(row.method, row.recipe) for row in own_rows(tmp_path)}
    assert found == {
        ("baseline", "200 epochs"),
        ("AHSG-HT", "200 epochs, threshold per epoch"),
        ("AHSG-HT", "200 epochs, heavy ball released"),
        ("AHSG-HT", "200 epochs, fixed mini-batch"),
        ("HSG-HT", "200 epochs, no heavy ball"),
        ("AHSG-HT", "200 epochs"),
        ("small from scratch", "200 epochs, small network of narrowest layer 16"),
        ("KD", "200 epochs, teacher resnet56 of 93.20 %"),
        ("AHSG-HT, fine-tuned", "200 epochs, pretrained"),
    }


def test_other_recipes_and_teachers_are_other_groups_other_folders_and_workers_are_not(put, tmp_path):
    put("a", seed=1, workers=0)
    put("b", seed=2, workers=4, save_path="elsewhere")
    put("c", seed=3, decay=1e-4)
    put("d", seed=4, changes={"arithmetic": "bfloat16"})
    put("e", seed=3, changes={"arithmetic": "float32"}, compile=True)
    for seed, sha in ((1, "00"), (2, "00"), (3, "11")):
        teacher = {"arch": "resnet56", "accuracy": 93.2, "sha256": sha}
        put(f"t{seed}", "prune_distill", seed=seed, teacher=f"{seed}.tar", changes={"teacher": teacher})
    assert sorted(row.seeds for row in own_rows(tmp_path)) == ["1 2", "1 2 3", "3", "3", "4"]


def test_small_networks_of_other_methods_and_rates_are_other_groups(put, tmp_path):
    """Told by the results.json beside the file, or as the run noted it; the runs that they are of may differ by seed."""
    for name, seed, options in (
        ("p1", 1, {}),
        ("p2", 2, {}),
        ("n2", 2, {"no_regrow": True}),
        ("f1", 1, {"HTrate": 0.6}),
    ):
        folder = put(name, seed=seed, **options)
        small = {"network": {"multiply_adds": 20_000_000 + seed, "parameters": 1}}
        put(f"s{name}", "baseline", seed=seed, widths_of=str(folder / "small.resnet20.pth.tar"), changes=small)
    noted = {"network": {"multiply_adds": 20_000_003, "parameters": 1}, "widths_from": "AHSG-HT 30 %"}
    put("s3", "baseline", seed=3, widths_of="gone/small.resnet20.pth.tar", changes=noted)
    found = {row.recipe: (row.seeds, row.multiply_adds) for row in own_rows(tmp_path) if "small" in row.method}
    assert found == {
        "200 epochs, small network of AHSG-HT 30 %": ("1 2 3", 20_000_002),
        "200 epochs, small network of AHSG-HT 30 %, no regrowth": ("2", 20_000_002),
        "200 epochs, small network of AHSG-HT 40 %": ("1", 20_000_001),
    }


def test_the_baseline_is_the_one_that_is_most_alike(put, tmp_path):
    bf16 = {"arithmetic": "bfloat16"}
    put("b", "baseline", last=92.0)
    put("p", "prune", last=91.0, changes=bf16)
    row = next(row for row in own_rows(tmp_path) if row.method == "AHSG-HT")
    assert row.change == -1.0 and "baseline in float32" in row.marks
    put("b64", "baseline", last=94.0, batch_size=64, k=128)
    put("b16", "baseline", last=92.6, changes=bf16)
    put("p32", "prune", last=91.0)
    rows = {row.recipe: row for row in own_rows(tmp_path) if row.method == "AHSG-HT"}
    assert rows["200 epochs, bfloat16"].change == pytest.approx(-1.6) and not rows["200 epochs, bfloat16"].marks
    # float32, and the same mini-batches.
    assert rows["200 epochs"].change == -3.0


def test_what_began_with_trained_weights_is_never_taken_for_scratch(put, tmp_path):
    put("base", "baseline", last=93.5)
    put("pruned", "prune", last=91.0)
    put("started", "prune", last=92.0, started_from="runs/base/best.resnet20.pth.tar")
    rows = {row.init: row for row in own_rows(tmp_path) if row.method == "AHSG-HT"}
    assert (rows["scratch"].accuracy, rows["pretrained"].accuracy) == (91.0, 92.0)
    assert rows["pretrained"].change == -1.5
    assert not [line for line in order(groups_of(tmp_path)[0], []) if "92.00" in line]
    text = report([tmp_path], "text")[0]
    assert "91.00 (one seed): -0.71 to AHSG-HT+KD" in text and "92.00 (one seed): " not in text


def test_a_seed_counts_once(put, tmp_path):
    put("a", last=90.0)
    put("b", last=80.0)
    groups, notes = groups_of(tmp_path)
    assert groups[0].last() == [90.0] and "repeats seed 1" in notes[0] and "80.00" in notes[0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "no JSON"),
        ("[1]", "no results of a run"),
        ("[" * 100_000, "no JSON"),
        (b"\xff\xfe", "no JSON"),
        ({"last_epoch_accuracy": None}, "'last_epoch_accuracy' is None"),
        ({"command": None}, "'command' is None"),
        ({"train_images": []}, "unhashable"),
        ({"seed": 10**400}, "too long"),
        ({"prune_rate": 10**400}, "OverflowError"),
        ({"last_epoch_accuracy": 900.0}, "900.0, no accuracy in %"),
        ({"last_epoch_accuracy": math.nan}, "nan"),
        ({"HTrate": 0.9}, "'HTrate' is 0.9"),
        ({"seed": True}, "'seed' is True"),
        ({"settings": {"k": "many"}}, "damaged"),
        ({"teacher": {"arch": "resnet56"}, "settings": {"teacher": "t"}}, "damaged"),
        ({"small": {"after": {"multiply_adds": 5}}}, "damaged"),
        ({"small": {"after": {"multiply_adds": 5, "parameters": "few"}}}, "damaged"),
    ],
)
def test_damaged_results_are_named_and_passed_over(put, tmp_path, content, reason):
    put("good")
    file = put("bad", seed=2) / "results.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(file.read_text()), **content})
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    groups, (note,) = groups_of(tmp_path)
    assert len(groups) == 1 and groups[0].summary.n == 1
    assert "bad/results.json" in note and "passed over" in note and reason in note


def test_an_unfinished_run_is_named_and_passed_over(put, tmp_path):
    put("a", changes=dict(finished=False, epochs_done=20))
    groups, (note,) = groups_of(tmp_path)
    assert not groups and "20 of 200 epochs" in note


def test_commands_logs_and_speed_are_told(put, tmp_path):
    folder = put("a", seed=4)
    timings = [dict(device="cpu", batch_size=b, speed_up=s) for b, s in ((128, 1.25), (1, 9.0))]
    (folder / "latency.resnet20.json").write_text(json.dumps({"timings": timings}))
    (row,) = own_rows(tmp_path)
    assert row.commands == "python train.py --name a" and row.logs.endswith("a/log_seed_4.txt")
    assert row.speed_up == "4: batch 128 on cpu 1.25"
    for form in ("text", "markdown", "csv"):
        assert all(part in report([tmp_path], form)[0] for part in (row.commands, row.logs, "1.25"))


def test_the_three_formats_hold_the_same_rows(put, tmp_path):
    put("base", "baseline", last=92.0)
    put("a", last=91.0, changes={"command": "a | b"})
    rows = list(csv.DictReader(io.StringIO(report([tmp_path], "csv")[0])))
    assert {row["kind"] for row in rows} == {"own", "published"}
    markdown = report([tmp_path], "markdown")[0]
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    assert len(lines) == len(rows) + 2 and len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_counts_that_an_old_run_lacks_are_made_from_its_kept_filters(put, tmp_path):
    committed = json.loads((RESULTS / "cpu-10-epochs/prune/results.json").read_text())
    put("old", changes={"small": {}, "filters": committed["filters"]})
    (row,) = own_rows(tmp_path)
    assert (row.multiply_adds, row.parameters) == (21_420_768, 139_047)


@pytest.mark.parametrize("rate, cuts", [(0.7, (42.2, 41.5, 41.1, 40.8)), (0.6, (54.0, 53.2, 52.6, 52.3))])
def test_the_papers_formula_gives_the_papers_cuts(rate, cuts):
    for depth, cut in zip((20, 32, 56, 110), cuts, strict=True):
        assert round(100 * papers_cut(depth, rate), 1) == cut


def test_order_says_what_is_open(put, tmp_path):
    for seed in (1, 2, 3):
        put(f"base{seed}", "baseline", last=92.0 + 0.1 * seed, seed=seed)
        put(f"prune{seed}", "prune", last=90.0 + 0.1 * seed, seed=seed)
        put(f"epoch{seed}", "prune", last=90.1 + 0.1 * seed, seed=seed, threshold_every="epoch")
    first, second = order(groups_of(tmp_path)[0], read_published())
    assert first.index("baseline 92.20") < first.index("threshold per epoch) 90.30") < first.index("AHSG-HT 30 % 90.20")
    assert second.startswith("2 of 3 differences exceed") and "0.10, 95 % of the seeds +- 0.23" in second


def test_order_of_single_seeds_has_the_test_images_uncertainty_and_says_so(put, tmp_path):
    put("base", "baseline", last=92.0)
    put("prune", "prune", last=91.9)
    _, second, third = order(groups_of(tmp_path)[0], read_published())
    # By hand: 1.95996 * sqrt((92 * 8 + 91.9 * 8.1) / 10000) = 0.754.
    assert "0.10, 95 % of the test images +- 0.75" in second and "2 of 2 methods ran with one seed" in third


def test_order_of_one_seed_and_several_knows_how_seeds_spread(put, tmp_path):
    for seed, last in ((1, 90.0), (2, 91.0), (3, 92.0)):
        put(f"base{seed}", "baseline", last=last, seed=seed)
    put("prune", "prune", last=88.0)
    _, second, _ = order(groups_of(tmp_path)[0], read_published())
    assert second.startswith("0 of 1") and "3.00, 95 % of the seeds of one of them +- 4.97" in second


def test_order_names_the_epochs_that_are_not_the_usual_ones(put, tmp_path):
    put("base", "baseline", last=92.0)
    put("prune", "prune", last=91.0)
    put("kd", "prune_distill", last=91.5, teacher="t")
    put("longer", "prune", last=91.6, epochs=400)
    first = order(groups_of(tmp_path)[0], [])[0]
    assert "AHSG-HT+KD 30 % (250 epochs, teacher resnet56 of 93.20 %) 91.50" in first and "baseline 92.00" in first
    assert "91.60" not in first


def test_a_small_network_of_equal_cost_joins_the_order_of_its_length(put, tmp_path):
    short = dict(epochs=10, schedule=[1, 3, 6, 8])
    half = {"network": {"multiply_adds": WHOLE["multiply_adds"] // 2, "parameters": 1}}
    put("base", "baseline", last=83.0, **short)
    put("equal epochs", "baseline", last=80.0, widths_of="f", changes=half, **short)
    put("equal cost", "baseline", last=82.0, widths_of="f", changes=half, epochs=20, schedule=[1, 6, 12, 16])
    put("other", "baseline", last=82.5, widths_of="f", changes=half, epochs=30, schedule=[1, 9, 18, 24])
    (line,) = [line for line in order(groups_of(tmp_path)[0], []) if " > " in line]
    assert "(20 epochs, small network of narrowest layer 16) 82.00" in line and "80.00" in line and "82.50" not in line
    assert all(row.pruned is None for row in own_rows(tmp_path) if row.method == "small from scratch")


def test_a_small_network_of_equal_cost_joins_the_order_of_full_recipes(put, tmp_path):
    half = {"network": {"multiply_adds": WHOLE["multiply_adds"] // 2, "parameters": 1}}
    put("base", "baseline", last=92.0)
    put("equal cost", "baseline", last=91.0, widths_of="f", changes=half, epochs=400)
    (line,) = [line for line in order(groups_of(tmp_path)[0], []) if " > " in line]
    assert "full recipes: baseline 92.00" in line and "(400 epochs" in line
    row = next(row for row in own_rows(tmp_path) if row.method == "small from scratch")
    assert row.change_published is None and "400 epochs instead of 200" in row.marks


def test_published_rows_are_well_formed_and_differences_computed():
    rows = read_published()
    assert len(rows) >= 60 and all(row.source for row in rows)
    slip = next(row for row in rows if "printed drop -0.16" in row.doubt)
    assert slip.change == pytest.approx(0.06)
    assert published_baseline(rows, "cifar10", "resnet56") == (93.59, "FPGM-T1")
    assert published_baseline(rows, "cifar10", "resnet44") == (92.83, "He2015")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("cifar10,resnet20,X,30,scratch,,,91,,,S", "11 cells"),
        ("cifar10,resnet20,X,30,scratch,,,ninety,,,S,", "acc must be a number"),
        ("cifar10,resnet20,X,30,scratch,,,910,,,S,", "acc must be a number"),
        ("cifar10,resnet20,X,30,random,,,91,,,S,", "init must be"),
        ("cifar10,resnet20,X,30,scratch,,,,,,S,", "must be there"),
        ("cifar10,resnet20,X,30,scratch,,,91,,,,", "must be there"),
        ("cifar10,resnet20,SFP,30,scratch,92.20,0.18,90.83,0.31,42.2,FPGM-T1,", "there already"),
    ],
)
def test_a_bad_published_row_is_named_by_its_line(tmp_path, line, reason):
    text = (RESULTS / "published.csv").read_text()
    file = tmp_path / "published.csv"
    file.write_text(text + line + "\n")
    with pytest.raises(UserError, match=f"line {text.count(chr(10)) + 1}.*{reason}"):
        read_published(file)


def test_the_readmes_table_and_results_tables_are_current():
    remedy = "python -m utils.compare_tables --update"
    readme = (ROOT / "README.md").read_text()
    assert replace_block(readme, readme_block()) == readme, remedy
    assert (RESULTS / "tables.md").read_text() == report([RESULTS], "markdown")[0], remedy


def test_a_changed_result_makes_the_readme_stale(tmp_path):
    shutil.copytree(RESULTS / "cpu-10-epochs", tmp_path / "cpu-10-epochs")
    readme = (ROOT / "README.md").read_text()
    file = tmp_path / "cpu-10-epochs/prune/results.json"
    results = json.loads(file.read_text())
    file.write_text(json.dumps({**results, "last_epoch_accuracy": results["last_epoch_accuracy"] + 0.01}))
    assert replace_block(readme, readme_block(tmp_path)) != readme


def test_results_hold_what_a_row_needs_and_are_small():
    for file in RESULTS.rglob("results.json"):
        names = {path.name for path in file.parent.iterdir()}
        assert {"metrics.csv", "curves.png"} <= names and any(name.startswith("log_seed_") for name in names)
        assert sum(path.stat().st_size for path in file.parent.iterdir()) < 1_000_000, file.parent


@pytest.mark.parametrize("text", ["", compare_tables.BEGIN, f"{compare_tables.END}{compare_tables.BEGIN}"])
def test_a_readme_without_markers_is_refused(text):
    with pytest.raises(UserError, match="once each"):
        replace_block(text, readme_block(RESULTS / "speed"))


def test_picture_and_errors_of_the_command(put, tmp_path, capsys):
    put("a")
    put("b", changes=dict(epochs_run_here=10))
    main([str(tmp_path), "--picture", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "OWN AHSG-HT" in capsys.readouterr().out
    with pytest.raises(UserError, match="'absent' is no folder"):
        main(["absent"])


def test_without_own_results_the_published_rows_are_shown(tmp_path, capsys):
    main([str(tmp_path)])
    out = capsys.readouterr().out
    assert "FPGM-only" in out and "resnet110" in out and "OWN" not in out.split("top-1 in %")[0]
