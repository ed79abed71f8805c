"""Distillation losses against naive float64 versions and closed forms, and the terms of --kd."""

import math
from statistics import correlation, fmean, stdev

import pytest
import torch

from utils.base.errors import UserError
from utils.train import losses
from utils.train.losses import LOSSES, Term, check_terms, parse_term

B, CLASSES = 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [p / sum(powers) for p in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def naive_kl(student, teacher, labels, T=4.0):
    pairs = zip(student, teacher, strict=True)
    return T**2 * fmean(kl(softmax([x / T for x in t]), softmax([x / T for x in s])) for s, t in pairs)


def naive_dkd(student, teacher, labels, alpha=1.0, beta=8.0, T=4.0):
    total = []
    for s, t, label in zip(student, teacher, labels, strict=True):
        p, q = (softmax([x / T for x in row]) for row in (t, s))
        target = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
        others = [[x / (1 - row[label]) for i, x in enumerate(row) if i != label] for row in (p, q)]
        total.append(alpha * target + beta * kl(*others))
    return T**2 * fmean(total)


def naive_dist(student, teacher, labels, beta=1.0, gamma=1.0, T=1.0):
    p, q = ([softmax([x / T for x in row]) for row in rows] for rows in (student, teacher))
    rows = fmean(1 - correlation(a, b) for a, b in zip(p, q, strict=True))
    columns = fmean(1 - correlation(a, b) for a, b in zip(zip(*p, strict=True), zip(*q, strict=True), strict=True))
    return T**2 * (beta * rows + gamma * columns)


def naive_mean(of):
    return lambda student, teacher, labels: fmean(
        of(s - t) for a, b in zip(student, teacher, strict=True) for s, t in zip(a, b, strict=True)
    )


NAIVE = {
    "MSE": naive_mean(lambda d: d * d),
    "L1": naive_mean(abs),
    # Quadratic below a difference of 1, linear above.
    "SmoothL1": naive_mean(lambda d: d * d / 2 if abs(d) < 1 else abs(d) - 0.5),
    "KL": naive_kl,
    "DKD": naive_dkd,
    "DIST": naive_dist,
}
OPTIONS = {
    "KL": {"T": 2.0},
    "DKD": {"alpha": 0.5, "beta": 3.0, "T": 2.0},
    "DIST": {"beta": 2.0, "gamma": 0.5, "T": 3.0},
}


@pytest.mark.parametrize("standardise", [0, 1])
@pytest.mark.parametrize("name", NAIVE)
def test_losses_are_those_of_a_naive_version(name, standardise):
    student, teacher = random(B, CLASSES), random(B, CLASSES, seed=1)
    rows = [student.tolist(), teacher.tolist()]
    if standardise:
        rows = [[[(x - fmean(row)) / stdev(row) for x in row] for row in part] for part in rows]
    for options in ({}, OPTIONS.get(name, {})):
        loss = Term("logits", name, 1.0, options | {"standardise": standardise}).make_loss()
        expected = NAIVE[name](*rows, LABELS.tolist(), **options)
        # Sun et al. add 1e-7 to the deviation.
        assert loss(student, teacher, LABELS).item() == pytest.approx(expected, rel=1e-6)


def test_attention_transfer_is_that_of_a_naive_version():
    student, teacher = random(2, 3, 2, 2), random(2, 4, 2, 2, seed=1)
    differences = []
    for s, t in zip(student, teacher, strict=True):
        maps = []
        for x in (s, t):
            energy = [sum(x[c, i, j].item() ** 2 for c in range(len(x))) for i in range(2) for j in range(2)]
            norm = math.sqrt(sum(e * e for e in energy))
            maps.append([e / norm for e in energy])
        differences += [(a - b) ** 2 for a, b in zip(*maps, strict=True)]
    assert losses.AT()(student, teacher, LABELS).item() == pytest.approx(fmean(differences), rel=1e-12)


@pytest.mark.parametrize("standardise", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(name, standardise):
    on = "logits" if "logits" in LOSSES[name].compares else "stages"
    teacher = random(B, CLASSES) if on == "logits" else random(2, 3, 4, 4)
    student = teacher.clone().requires_grad_()
    loss = Term(on, name, 1.0, {"standardise": standardise}).make_loss()(student, teacher, LABELS)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert student.grad.abs().max() < 1e-8


@pytest.mark.parametrize("name", ["KL", "DKD", "DIST", "MSE"])
def test_standardised_losses_do_not_see_shift_and_scale_of_rows(name):
    student, teacher = random(B, CLASSES), random(B, CLASSES, seed=1)
    loss = Term("logits", name, 1.0, {"standardise": 1}).make_loss()
    shift, scale = random(B, 1, seed=2), random(B, 1, seed=3).abs() + 0.5
    expected = loss(student, teacher, LABELS).item()
    assert loss(student * scale + shift, teacher, LABELS).item() == pytest.approx(expected, rel=1e-5)
    assert loss(student, teacher * scale + shift, LABELS).item() == pytest.approx(expected, rel=1e-5)
    plain = Term("logits", name).make_loss()
    assert plain(student * scale, teacher, LABELS).item() != pytest.approx(plain(student, teacher, LABELS).item())


@pytest.mark.parametrize("name", ["KL", "DKD", "DIST"])
@pytest.mark.parametrize("standardise", [0, 1])
def test_extreme_and_constant_logits_give_finite_gradients(name, standardise):
    student = (torch.eye(3, 4) * 1000).requires_grad_()
    teacher = torch.ones(3, 4)
    loss = Term("logits", name, 1.0, {"standardise": standardise}).make_loss()
    for first, second in ((student, teacher), (teacher.clone().requires_grad_(), student.detach())):
        value = loss(first, second, torch.tensor([0, 1, 3]))
        value.backward()
        assert value.isfinite() and first.grad.isfinite().all()


def test_a_term_is_what_its_text_says():
    term = parse_term("logits:DKD:0.5:beta=2,T=3,standardise=1")
    assert term == Term("logits", "DKD", 0.5, {"beta": 2, "T": 3, "standardise": 1})
    assert parse_term(str(term)) == term
    assert parse_term("feature:MSE") == Term("feature", "MSE", 1.0, {})
    assert isinstance(term.make_loss(), losses.Standardised) and term.make_loss().loss.beta == 2


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("KL", "must be ON:LOSS"),
        ("weights:MSE", "feature, stages, logits"),
        ("logits:KL:1:T=2:3", "must be ON:LOSS"),
        ("logits:CRD", "unknown loss 'CRD'; choose from MSE.*DIST"),
        ("feature:KL", "KL compares logits; on feature use MSE, L1, SmoothL1"),
        ("logits:AT", "AT compares stages"),
        ("logits:KL:-1", "weight must be >= 0, got -1"),
        ("logits:KL:much", "weight must be a number, got 'much'"),
        ("logits:KL:nan", "weight must be a number, got 'nan'"),
        ("logits:DKD:1:tau=2", "no option 'tau'; its options: alpha, beta, T, standardise"),
        ("feature:MSE:1:standardise=1", "no option 'standardise'; its options: none"),
        ("logits:KL:1:T=hot", "T must be a number, got 'hot'"),
        ("logits:KL:1:T=0", "T must be > 0, got 0"),
        ("logits:KL:1:standardise=2", "standardise must be 0 or 1"),
    ],
)
def test_a_bad_term_is_one_line(text, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        parse_term(text)
    assert f"--kd '{text}'" in str(caught.value) and "\n" not in str(caught.value)


def test_a_term_keeps_its_numbers():
    text = "logits:KL:0.123456789:T=3.00000001"
    assert str(parse_term(text)) == text and parse_term(text).weight == 0.123456789


def test_two_terms_of_one_loss_on_the_same_outputs_are_refused():
    check_terms([Term("logits", "KL"), Term("logits", "DKD"), Term("feature", "MSE"), Term("stages", "MSE")])
    with pytest.raises(UserError, match="logits:KL is given 2 times"):
        check_terms([Term("logits", "KL", 0.5), Term("logits", "KL", 1.0, {"T": 2.0})])


def test_an_option_without_default_must_be_given(monkeypatch):
    class Needy(losses.MSE):
        def __init__(self, p):
            super().__init__()

    monkeypatch.setitem(LOSSES, "Needy", Needy)
    with pytest.raises(UserError, match="Needy needs the option p, as logits:Needy:1:p=NUMBER"):
        parse_term("logits:Needy")
