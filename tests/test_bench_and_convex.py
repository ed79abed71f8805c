"""The benchmark of the optimizer, and the paper's convex experiments: gradients, sparsity, order, files and their errors."""

import json

import numpy as np
import pytest
import torch
from scipy import sparse

from AHSG_HT import AHSG_HT
from utils import bench_optimizer, convex_methods, heavy_ball, paper_convex
from utils.bench_optimizer import OPTIMIZERS, one_step
from utils.convex_methods import METHODS, Settings, best_known, polish, run_method
from utils.convex_problems import Problem, epsilon_like, mnist_like, rcv1_like, read_libsvm
from utils.errors import UserError
from utils.per_filter_loop import PerFilterLoop

SMALL = Settings(k=10, passes=4, batch_size=8, growth=0.05)


def small_problem(classes=1, sparse_features=False, seed=0):
    """60 samples, 12 features."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((60, 12)) * (rng.random((60, 12)) < 0.6)
    labels = rng.choice([-1.0, 1.0], 60) if classes == 1 else rng.integers(0, classes, 60)
    return Problem("small", sparse.csr_array(matrix) if sparse_features else matrix, labels, classes, penalty=0.01)


# ---- the benchmark ----------------------------------------------------------------------------------------------------


def test_bench_prints_a_row_and_a_ratio_for_every_optimizer(capsys, tmp_path):
    bench_optimizer.main(
        ["--device", "cpu", "--nets", "resnet20", "--repeats", "2", "--channels_last", "--save_path", str(tmp_path)]
    )
    printed = capsys.readouterr().out
    for label in OPTIMIZERS:
        row = next(line for line in printed.splitlines() if line.startswith(f"| resnet20 | channels_last | {label} |"))
        median, ratio = float(row.split("|")[4]), float(row.split("|")[6])
        assert median > 0 and ratio > 0
    saved = json.loads((tmp_path / "bench_cpu_channels_last.json").read_text())
    assert saved["results"][0]["parameters"] == 269_722
    assert set(saved["results"][0]["rows"]) == set(OPTIMIZERS)
    assert (tmp_path / "bench_cpu_channels_last.md").read_text() in printed


def test_bench_knows_torchvisions_resnet50():
    params = bench_optimizer.parameters_with_gradients("resnet50", torch.device("cpu"), channels_last=True)
    assert sum(p.numel() for p in params) == 25_557_032
    assert all(p.grad.stride() == p.stride() for p in params)


def test_bench_fails_on_a_step_that_waits_for_the_gpu(monkeypatch, capsys):
    row = dict(median_ms=1.0, fastest_ms=1.0, slowest_ms=1.0, steps=1, ratio=1.0, ratio_of_fastest=1.0)
    rows = {label: row | {"synchronisations": int(label == "AHSG-HT")} for label in OPTIMIZERS}
    result = dict(net="resnet20", layout="contiguous", parameters=1, rows=rows)
    monkeypatch.setattr(bench_optimizer, "bench", lambda *_: result)
    with pytest.raises(SystemExit) as stop:
        bench_optimizer.main(["--device", "cpu", "--nets", "resnet20"])
    assert stop.value.code == 1
    assert "waited for the GPU: 1 on resnet20" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_step_on_the_gpu_never_waits(channels_last):
    params = bench_optimizer.parameters_with_gradients("resnet20", torch.device("cuda"), channels_last)
    optimizer = OPTIMIZERS["AHSG-HT"](params)
    one_step(optimizer)
    assert bench_optimizer.count_synchronisations(optimizer) == 0
    assert bench_optimizer.count_synchronisations(OPTIMIZERS["per-filter loop"](params)) > 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--nets", "resnet21"], "resnet21"),
        (["--repeats", "0"], "--repeats"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "no CUDA GPU")]),
    ],
)
def test_bench_refuses_bad_flags_by_name(flags, message):
    with pytest.raises(UserError, match=message):
        bench_optimizer.main(flags)


def test_per_filter_loop_takes_the_steps_of_AHSG_HT():
    fast = bench_optimizer.parameters_with_gradients("resnet20", torch.device("cpu"), False)
    slow = bench_optimizer.parameters_with_gradients("resnet20", torch.device("cpu"), False)
    recipe = dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, v=0.1, HTrate=0.7)
    optimizers = AHSG_HT(fast, **recipe), PerFilterLoop(slow, **recipe)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for p, q in zip(fast, slow, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            one_step(optimizer)
        for p, q in zip(fast, slow, strict=True):
            assert torch.equal(p == 0, q == 0)
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# ---- problems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, np.array([3, 1, 40, 3])], ids=["all", "mini-batch"])
@pytest.mark.parametrize("sparse_features", [False, True])
@pytest.mark.parametrize("classes", [1, 3])
def test_gradients_are_those_of_autograd(classes, sparse_features, rows):
    problem = small_problem(classes, sparse_features)
    weights = np.random.default_rng(1).standard_normal((12, classes))
    w = torch.tensor(weights, requires_grad=True)
    chosen = slice(None) if rows is None else rows
    matrix = problem.features.toarray() if sparse_features else problem.features
    scores, labels = torch.tensor(matrix[chosen]) @ w, torch.tensor(problem.labels[chosen])
    if classes == 1:
        data_term = torch.nn.functional.softplus(-labels * scores[:, 0]).mean()
    else:
        data_term = torch.nn.functional.cross_entropy(scores, labels)
    loss = data_term + 0.01 / 2 * (w * w).sum()
    loss.backward()
    np.testing.assert_allclose(problem.gradient(weights, rows), w.grad.numpy(), rtol=1e-10, atol=1e-12)
    if rows is None:
        assert problem.objective(weights) == pytest.approx(loss.item(), rel=1e-12)


@pytest.mark.parametrize("classes", [1, 3])
def test_no_direction_is_curved_more_than_the_smoothness(classes):
    problem = small_problem(classes)
    rng = np.random.default_rng(2)
    for _ in range(50):
        a, b = rng.standard_normal((2, 12, classes))
        change = np.linalg.norm(problem.gradient(a) - problem.gradient(b))
        assert change <= problem.smoothness() * np.linalg.norm(a - b) * (1 + 1e-9)


def test_the_made_problems_have_the_shape_of_their_models():
    text, images = rcv1_like(0), mnist_like(0, samples=500)
    assert text.features.shape == (20_242, 47_236)
    assert 0.0014 < text.features.nnz / np.prod(text.features.shape) < 0.0018
    norms = np.sqrt(text.features.multiply(text.features).sum(axis=1))
    np.testing.assert_allclose(norms, 1, rtol=1e-12)
    assert 0.4 < (text.labels == 1).mean() < 0.6
    assert images.features.shape == (500, 784) and images.classes == 10
    assert 0.17 < images.features.nnz / images.features.shape[0] / 784 < 0.21


def test_a_seed_makes_one_problem():
    one, again, other = (epsilon_like(seed, samples=50, features=20) for seed in (0, 0, 1))
    assert np.array_equal(one.features, again.features) and np.array_equal(one.labels, again.labels)
    assert not np.array_equal(one.features, other.features)


# ---- libsvm files -----------------------------------------------------------------------------------------------------


def test_a_libsvm_file_of_two_labels_is_logistic_regression(tmp_path):
    path = tmp_path / "toy.svm"
    path.write_text("# made by hand\n2 1:0.5 4:-2\n\n1 2:1e-1 # a comment\n2\n")
    problem = read_libsvm(path)
    assert problem.name == "toy" and problem.classes == 1
    assert problem.labels.tolist() == [1, -1, 1]
    assert problem.features.toarray().tolist() == [[0.5, 0, 0, -2], [0, 0.1, 0, 0], [0, 0, 0, 0]]


def test_a_libsvm_file_of_more_labels_is_softmax_regression(tmp_path):
    path = tmp_path / "toy.svm"
    path.write_text("7 1:1\n-1 1:2\n3 2:1\n")
    problem = read_libsvm(path)
    assert problem.classes == 3 and problem.labels.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("1 1:1\n-1 2:x\n", "line 2"),
        ("1 1:1\n-1 0:1\n", "line 2.*start at 1"),
        ("1 1:1\n-1 3:1 2:1\n", "line 2.*ascend"),
        ("1 1:1\n-1 2\n", "line 2"),
        ("1 1:1\nspam 2:1\n", "line 2"),
        ("1 1:1\n-1 2:nan\n", "line 2.*nan"),
        ("", "no features"),
        ("1\n-1\n", "no features"),
        ("1 1:0\n-1 2:0\n", "none that is not 0"),
        ("1 1:1\n1 2:1\n", "1 different label"),
        ("".join(f"{i}.5 1:1\n" for i in range(300)), "no classes"),
        ("1 1:1\n-1 99999999999999999999999:1\n", "line 2.*largest"),
        ("1 1:1\n-1 4000000000:1\n", "line 2.*largest"),
        ("caf\xe9 1:1\n", "cannot be read"),
    ],
)
def test_a_bad_libsvm_file_ends_in_one_clear_line(text, message, tmp_path):
    path = tmp_path / "bad.svm"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        read_libsvm(path)
    assert "bad.svm" in str(error.value)


# ---- the methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_every_iterate_is_k_sparse_and_counted(method, classes, monkeypatch):
    problem, seen = small_problem(classes), []
    step = AHSG_HT.step

    def watched(optimizer, *args):
        step(optimizer, *args)
        seen.append([int(p.count_nonzero()) for p in optimizer.param_groups[0]["params"]])

    monkeypatch.setattr(AHSG_HT, "step", watched)
    run = run_method(problem, method, 0.05, Settings(k=5, passes=4, batch_size=8, growth=0.05))
    assert len(seen) == run.thresholdings[-1] > 0
    assert all(counts == [5] for counts in seen)
    assert run.passes[0] == 0 and run.passes[-1] <= 4
    assert run.objective[-1] == problem.objective(run.weights)


def test_passes_and_thresholdings_are_those_of_the_method():
    problem = small_problem()
    runs = {method: run_method(problem, method, 0.01, SMALL) for method in METHODS}
    counts = {method: run.at(1)[1] for method, run in runs.items()}
    assert counts["FG-HT"] == 1
    assert counts["SG-HT"] == 7  # 60 samples in mini-batches of 8; the last 4 samples are left out
    assert counts["SVRG-HT"] == 0  # the first pass goes into the full gradient
    assert runs["SVRG-HT"].at(3)[1] == 7
    # 8 8 8 9 9 10, and 10 do not fit into the remaining 8
    assert counts["HSG-HT"] == counts["AHSG-HT"] == 6
    # Continued growth: fewer of them in every later pass.
    assert runs["HSG-HT"].at(2)[1] - 6 < 6


def test_every_mark_sees_the_last_iterate_that_fits_into_it(monkeypatch):
    """AHSG_HT's own steps, counted beside the records."""
    problem, sizes = small_problem(), []
    gradient = Problem.gradient

    def watched(problem, weights, rows=None):
        sizes.append(60 if rows is None else len(rows))
        return gradient(problem, weights, rows)

    monkeypatch.setattr(Problem, "gradient", watched)
    for method in ("SG-HT", "HSG-HT", "FG-HT", "SVRG-HT"):
        sizes.clear()
        run = run_method(problem, method, 0.01, SMALL)
        used = np.cumsum(sizes)
        for passes in (1, 2.5, 4):
            last = run.passes[np.searchsorted(run.passes, passes + 1e-9) - 1]
            assert last * 60 == pytest.approx(max(used[used <= passes * 60]), abs=1 if method != "SVRG-HT" else 8), (
                method
            )


def test_no_short_mini_batch_is_taken(monkeypatch):
    problem, sizes = small_problem(), {}
    gradient = Problem.gradient
    for method in ("SG-HT", "HSG-HT"):
        taken = sizes[method] = []
        with monkeypatch.context() as patch:
            patch.setattr(
                Problem, "gradient", lambda p, w, rows, taken=taken: (taken.append(len(rows)), gradient(p, w, rows))[1]
            )
            run_method(problem, method, 0.01, Settings(k=5, passes=30, batch_size=8, growth=0.05))
    assert set(sizes["SG-HT"]) == {8}
    assert sizes["HSG-HT"] == sorted(sizes["HSG-HT"]) and sizes["HSG-HT"][-1] == 60  # up to the full gradient


def test_svrg_is_the_full_gradient_on_average_and_at_the_snapshot():
    problem = small_problem()
    weights, _ = convex_methods.hard_thresholding_optimizer(problem, 5, 0.1, 0.0)
    stream = convex_methods._gradients(problem, "SVRG-HT", weights, SMALL)
    assert next(stream) == (None, 60)
    gradient, evaluations = next(stream)
    np.testing.assert_allclose(gradient, problem.gradient(np.zeros((12, 1))), rtol=1e-12)
    assert evaluations == 16
    weights.detach()[:] = torch.randn(12, 1, generator=torch.Generator().manual_seed(0)).double()
    point = weights.detach().numpy().copy()
    parts = [next(stream)[0] for _ in range(6)]  # mini-batches 2 to 7 of the epoch
    assert np.linalg.norm(np.mean(parts, 0) - problem.gradient(point)) < np.linalg.norm(problem.gradient(point))
    assert next(stream) == (None, 60)
    np.testing.assert_allclose(next(stream)[0], problem.gradient(point), rtol=1e-12)


@pytest.mark.parametrize("method", ["HSG-HT", "AHSG-HT", "SVRG-HT"])
def test_methods_come_near_the_best_objective_of_a_small_problem(method):
    problem = epsilon_like(0, samples=300, features=30)
    settings = Settings(k=10, passes=40, batch_size=8, growth=0.05, v=0.5)
    smoothness = problem.smoothness()
    run = run_method(problem, method, 0.5 / smoothness, settings)
    best, own = best_known(problem, 10, [run.weights], smoothness)
    assert best <= own[0] <= run.objective[-1] + 1e-12
    assert run.objective[-1] - own[0] < 0.1 * (run.objective[0] - own[0])


def test_a_run_that_diverges_is_given_up():
    problem = small_problem()
    run = run_method(problem, "FG-HT", 1e9, SMALL)
    assert run.objective[-1] == np.inf
    assert run.at(4)[0] == np.inf


@pytest.mark.parametrize("classes", [1, 3])
def test_polish_finds_the_point_of_zero_slope_on_the_support(classes):
    problem = small_problem(classes)
    start = np.zeros((12, classes))
    start[2:6] = 0.1
    start[4, 0] = 0
    objective, weights = polish(problem, start)
    assert np.array_equal(weights != 0, start != 0)
    assert np.abs(problem.gradient(weights)[start != 0]).max() < 1e-6
    assert objective == pytest.approx(problem.objective(weights), rel=1e-12) and objective < problem.objective(start)


def test_the_whole_comparison_writes_table_figures_and_picture(tmp_path, monkeypatch, capsys):
    path = tmp_path / "toy.svm"
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 6))
    labels = np.where(rows[:, 0] + 0.5 * rng.standard_normal(40) > 0, 1, -1)
    path.write_text(
        "".join(
            f"{label} {' '.join(f'{i + 1}:{x}' for i, x in enumerate(row))}\n"
            for label, row in zip(labels, rows, strict=True)
        )
    )
    monkeypatch.setattr(paper_convex, "LR_GRID", (0.25, 1.0))
    out = tmp_path / "out"
    results = paper_convex.main(
        ["--problem", str(path), "--k", "2", "3", "--passes", "3", "--batch_size", "4", "--save_path", str(out)]
    )
    assert [r["settings"]["k"] for r in results] == [2, 3]
    assert sorted(p.name for p in out.iterdir()) == ["table.md", "toy.json", "toy.png"]
    saved = json.loads((out / "toy.json").read_text())
    for result in saved["results"]:
        assert list(result["methods"]) == list(METHODS)
        assert list(result["order"]) == ["1", "2", "3"]
        assert sorted(result["order"]["1"]) == sorted(METHODS)
        for m in result["methods"].values():
            assert all(min(at["curve"]["gap"]) >= 0 for at in m["at"].values())
        # Of the step sizes the one with the lowest end is taken.
        end = result["methods"]["FG-HT"]["at"]["3"]
        ends = result["methods"]["FG-HT"]["end_objective_by_lr_times_curvature"]
        assert min(ends, key=ends.get) == f"{end['lr_times_curvature']:g}"
        assert end["curve"]["gap"][-1] == min(ends.values()) - result["best_objective"]
    assert (out / "table.md").read_text() in capsys.readouterr().out
    with pytest.raises(UserError, match="earlier comparison"):
        paper_convex.main(["--problem", str(path), "--k", "2", "--save_path", str(out)])


def test_what_departs_from_the_papers_order_is_named():
    gaps = dict(zip(METHODS, (-5.0, -6.0, -4.0, -3.0, -1.0), strict=True))
    assert paper_convex.against_paper(gaps) == "AHSG-HT -5.00 is not below HSG-HT -6.00 (by 1.00)"
    assert paper_convex.against_paper(gaps | {"AHSG-HT": -7.0}) == "the paper's order"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--problem", "nowhere.svm"], "nowhere.svm"),
        (["--passes", "0.5"], "--passes"),
        (["--growth", "1"], "--growth"),
        (["--v", "1"], "--v"),
        (["--batch_size", "0"], "--batch_size"),
        (["--seed", "-1"], "--seed"),
        (["--problem", "mnist", "mnist.scale"], "2 of them would write mnist.json"),
        (["--problem", "a/train.svm", "b/train.svm"], "2 of them would write train.json"),
    ],
)
def test_paper_convex_refuses_bad_flags_by_name(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        paper_convex.main([*flags, "--save_path", str(tmp_path)])


def test_more_entries_than_features_are_refused(tmp_path):
    path = tmp_path / "toy.svm"
    path.write_text("1 1:1\n-1 2:1\n")
    with pytest.raises(UserError, match=r"--k 3: must be in 1..2"):
        paper_convex.main(["--problem", str(path), "--k", "3", "--save_path", str(tmp_path)])
    with pytest.raises(UserError, match=r"--batch_size 64: .*toy.svm has 2 samples"):
        paper_convex.main(["--problem", str(path), "--k", "2", "--save_path", str(tmp_path)])


def test_a_file_with_the_name_of_a_made_problem_is_not_called_synthetic(tmp_path, monkeypatch):
    path = tmp_path / "mnist.scale"
    path.write_text("1 1:1\n-1 1:-2\n1 1:3\n")
    monkeypatch.setattr(paper_convex, "LR_GRID", (1.0,))
    flags = ["--k", "1", "--passes", "1", "--batch_size", "1", "--save_path", str(tmp_path / "out")]
    result = paper_convex.main(["--problem", str(path), *flags])[0]
    assert result["problem"] == "mnist" and result["synthetic"] is False
    assert mnist_like(0, samples=20).synthetic


@pytest.mark.parametrize("shape", [(60, 1), (1, 12), (2, 12)])
@pytest.mark.parametrize("sparse_features", [False, True])
def test_smoothness_of_narrow_data_is_that_of_its_largest_singular_value(shape, sparse_features):
    matrix = np.random.default_rng(0).standard_normal(shape)
    problem = Problem("narrow", sparse.csr_array(matrix) if sparse_features else matrix, np.ones(shape[0]), penalty=0.5)
    assert problem.smoothness() == pytest.approx(0.25 * np.linalg.norm(matrix, 2) ** 2 / shape[0] + 0.5)


def test_features_too_large_for_a_singular_value_end_in_one_clear_line():
    matrix = np.array([[1e200, 3.0, 0.0], [2.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    with pytest.raises(UserError, match=r"big: .*scale them"):
        Problem("big", sparse.csr_array(matrix), np.array([1.0, -1.0, 1.0])).smoothness()


def test_where_every_step_size_diverges_the_gap_is_infinite(tmp_path, monkeypatch):
    problem = small_problem()
    monkeypatch.setattr(paper_convex, "LR_GRID", (1e9,))
    result = paper_convex.compare(problem, SMALL)
    assert {m["at"]["4"]["log10_gap"] for m in result["methods"].values()} == {np.inf}


# ---- heavy ball -------------------------------------------------------------------------------------------------------


def test_the_theorys_heavy_ball_needs_far_fewer_iterations_and_the_released_one_none_fewer():
    counts = heavy_ball.measure(kappa=100)
    assert counts["paper"] * 3 < counts["v_0"]
    assert counts["released"] == counts["v_0"]


def test_heavy_ball_table_names_every_kappa(monkeypatch, capsys):
    monkeypatch.setattr(heavy_ball, "LIMIT", 60)
    heavy_ball.main([])
    printed = capsys.readouterr().out
    for kappa in heavy_ball.KAPPAS:
        assert f"| {kappa} | 0 |" in printed
    assert "> 60" in printed


def test_all_methods_are_run_by_AHSG_HT():
    weights, optimizer = convex_methods.hard_thresholding_optimizer(small_problem(3), k=5, lr=0.1, v=0.2)
    assert type(optimizer) is AHSG_HT and weights.shape == (12, 3)
    assert {name: optimizer.param_groups[0][name] for name in ("v", "unit", "momentum")} == {
        "v": 0.2,
        "unit": "element",
        "momentum": 0.0,
    }
