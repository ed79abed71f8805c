"""The convex problems of the optimizer's paper: logistic and softmax regression on sparse or dense data.

    f(W) = 1/n sum_i loss(a_i^T W, b_i) + penalty/2 ||W||^2

(Zhou, Yuan, Feng, NeurIPS 2018, section 5.1). Data is made by code in the shape of the paper's sets, or read from a libsvm file; the synthetic sets
were settled before any method ran on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import ArpackError, svds
from scipy.special import expit, logsumexp, softmax

from utils.errors import UserError

PENALTY = 1e-5
# Words of the sparse problem's text follow Zipf's law, flattened for the most frequent ones.
ZIPF_OFFSET = 30
TOPICS = 50
# Words that come twice in a document fill one entry.
LENGTH_FACTOR = 1.01
# Largest index of a feature in a libsvm file; the weights are dense, eight bytes each.
LARGEST_INDEX = 10**8


@dataclass
class Problem:
    """An l2-regularised linear model.

    Attributes:
        features: (n, d) float64, a CSR matrix or an array.
        labels: (n,), -1 and 1 for logistic regression (classes = 1), else 0..classes-1.
        classes: columns of W (d, classes).
        penalty: of the squared l2 norm.
        synthetic: made by code, not read from a file.
    """

    name: str
    features: sparse.csr_array | np.ndarray
    labels: np.ndarray
    classes: int = 1
    penalty: float = PENALTY
    synthetic: bool = False

    @property
    def is_sparse(self) -> bool:
        return sparse.issparse(self.features)

    def objective(self, weights: np.ndarray) -> float:
        """f(W) over all samples, W (d, classes)."""
        scores = self.features @ weights
        if self.classes == 1:
            losses = np.logaddexp(0, -self.labels * scores[:, 0])
        else:
            losses = logsumexp(scores, axis=1) - scores[np.arange(len(scores)), self.labels]
        return float(losses.mean() + self.penalty / 2 * np.sum(weights**2))

    def gradient(self, weights: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Mean gradient (d, classes) over the samples `rows`, over all for None."""
        features, labels = self.features, self.labels
        if rows is not None:
            features, labels = features[rows], labels[rows]
        scores = features @ weights
        if self.classes == 1:
            residuals = (-labels * expit(-labels * scores[:, 0]))[:, None]
        else:
            residuals = softmax(scores, axis=1)
            residuals[np.arange(len(scores)), labels] -= 1
        return features.T @ residuals / len(labels) + self.penalty * weights

    def smoothness(self) -> float:
        """A bound on the largest curvature of f: the loss's own (1/4 logistic, 1/2 softmax) times that of the data.

        Raises:
            UserError: the features are too large for it.
        """
        if min(self.features.shape) == 1:
            singular = np.sqrt(
                self.features.multiply(self.features).sum() if self.is_sparse else np.sum(self.features**2)
            )
        else:
            start = np.ones(min(self.features.shape))
            try:
                singular = svds(self.features, k=1, return_singular_vectors=False, v0=start, rng=0)[0]
            except ArpackError as error:
                raise UserError(
                    f"{self.name}: no singular value of the features is found; scale them ({error})"
                ) from None
        curvature = 0.25 if self.classes == 1 else 0.5
        return float(curvature * singular**2 / len(self.labels) + self.penalty)

    def restricted(self, kept: np.ndarray) -> Problem:
        """The problem of the features `kept` alone."""
        return replace(self, features=self.features[:, kept])


def rcv1_like(seed: int, samples: int = 20_242, features: int = 47_236) -> Problem:
    """News-like rows: about 0.16 % of the entries, tf-idf weights, unit norm.

    Every document has one of TOPICS topics, which gives its class: half of the topics are the class 1, 3 % of the labels are wrong. Word
    frequencies follow Zipf's law, and a topic uses every word more or less than others do, by log-normal factors: so most words say
    something about the class, many say the same, and the spectrum has a large direction (the mean), some tens of topics, and a long tail.
    """
    rng = np.random.default_rng(seed)
    frequency = 1 / (np.arange(features) + ZIPF_OFFSET)
    topics = rng.integers(0, TOPICS, samples)
    lengths = rng.poisson(0.0016 * LENGTH_FACTOR * features, samples) + 1
    rows = np.repeat(np.arange(samples), lengths)
    words = np.empty(len(rows), dtype=np.int64)
    for topic in range(TOPICS):
        own = frequency * rng.lognormal(sigma=1.0, size=features)
        mine = topics[rows] == topic
        words[mine] = np.searchsorted(np.cumsum(own) / own.sum(), rng.random(int(mine.sum())))
    counts = sparse.csr_array((np.ones(len(rows)), (rows, np.minimum(words, features - 1))), shape=(samples, features))
    counts.sum_duplicates()
    documents = np.bincount(counts.indices, minlength=features)
    counts.data = (1 + np.log(counts.data)) * np.log(samples / documents[counts.indices])
    labels = np.where((topics < TOPICS // 2) ^ (rng.random(samples) < 0.03), 1.0, -1.0)
    return Problem("rcv1", _unit_rows(counts), labels, synthetic=True)


def epsilon_like(seed: int, samples: int = 40_000, features: int = 2_000) -> Problem:
    """Dense rows of unit norm; about half of their energy lies in ten common factors. Labels are drawn from a logistic model with 200
    non-zero weights. (The original has 400,000 rows.)"""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((samples, features))
    matrix += rng.standard_normal((samples, 10)) @ rng.standard_normal((10, features)) * 0.3
    matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
    return Problem("epsilon", matrix, _noisy_labels(matrix, min(200, features // 2), rng), synthetic=True)


def mnist_like(seed: int, samples: int = 20_000, classes: int = 10) -> Problem:
    """Image-like rows of 28x28 pixels, 19 % of them not zero: a smooth blot of the class, distorted so much that a linear
    model errs on about a tenth of them. (The original has 60,000 rows.)"""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, samples)
    smooth = np.kron(np.eye(7), np.ones((4, 1))) @ rng.standard_normal((classes, 7, 7)) @ np.kron(np.eye(7), np.ones(4))
    images = smooth.reshape(classes, 784)[labels]
    images = images + 2.5 * np.repeat(rng.standard_normal((samples, 196)), 4, axis=1)
    cut = np.quantile(images, 0.81, axis=1, keepdims=True)
    images = np.where(images > cut, np.minimum(images - cut, 1), 0)
    return Problem("mnist", sparse.csr_array(images), labels, classes, synthetic=True)


SYNTHETIC: dict[str, Callable[[int], Problem]] = {"rcv1": rcv1_like, "epsilon": epsilon_like, "mnist": mnist_like}


def make_problem(name: str, seed: int) -> Problem:
    """A synthetic problem by its name, or one from a libsvm file by its path.

    Raises:
        UserError: neither; or the file is bad.
    """
    if name in SYNTHETIC:
        return SYNTHETIC[name](seed)
    if not Path(name).is_file():
        raise UserError(f"--problem {name}: neither one of {', '.join(SYNTHETIC)} nor a libsvm file")
    return read_libsvm(Path(name))


def read_libsvm(path: Path) -> Problem:
    """A file with a line `label index:value index:value ...` per sample, indices from 1 on and ascending; `#` opens a comment.

    Two labels give logistic regression (the larger is 1), more of them softmax regression.

    Raises:
        UserError: with the file's name, the line's number and what is wrong there.
    """
    labels, values, indices, ends = [], [], [], [0]
    try:
        with open(path, encoding="ascii") as file:
            for number, line in enumerate(file, start=1):
                words = line.split("#", 1)[0].split()
                if not words:
                    continue
                try:
                    labels.append(_finite(words[0]))
                    last = 0
                    for word in words[1:]:
                        index, value = word.split(":")
                        if int(index) <= last:
                            raise ValueError(f"index {index} after {last}; indices start at 1 and ascend")
                        if int(index) > LARGEST_INDEX:
                            raise ValueError(f"index {index}; the weights are dense, so {LARGEST_INDEX} is the largest")
                        last = int(index)
                        indices.append(last - 1)
                        values.append(_finite(value))
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: not 'label index:value ...' ({error})") from None
                ends.append(len(indices))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a libsvm file ({error})") from None
    if not any(values):
        raise UserError(f"{path}: holds no features, or none that is not 0")
    kinds, numbers = np.unique(labels, return_inverse=True)
    if len(kinds) < 2:
        raise UserError(f"{path}: holds {len(kinds)} different label, at least 2 are needed")
    if len(kinds) > max(100, len(labels) // 10):
        raise UserError(f"{path}: holds {len(kinds)} different labels in {len(labels)} samples; these are no classes")
    matrix = sparse.csr_array((np.array(values), np.array(indices), ends), shape=(len(labels), max(indices) + 1))
    if len(kinds) == 2:
        return Problem(path.stem, matrix, 2.0 * numbers - 1)
    return Problem(path.stem, matrix, numbers, len(kinds))


def _finite(word: str) -> float:
    number = float(word)
    if not np.isfinite(number):
        raise ValueError(f"{word} is not a finite number")
    return number


def _unit_rows(matrix: sparse.csr_array) -> sparse.csr_array:
    norms = np.sqrt(matrix.multiply(matrix).sum(axis=1))
    return sparse.csr_array(sparse.diags_array(1 / np.maximum(norms, 1e-300)) @ matrix)


def _noisy_labels(matrix: np.ndarray, relevant: int, rng: np.random.Generator) -> np.ndarray:
    """Labels -1 and 1 drawn from a logistic model with `relevant` non-zero weights; the scores have standard deviation 3."""
    truth = np.zeros(matrix.shape[1])
    truth[rng.choice(len(truth), relevant, replace=False)] = rng.standard_normal(relevant)
    scores = matrix @ truth
    scores = 3 * (scores - scores.mean()) / scores.std()
    return np.where(rng.random(len(scores)) < expit(scores), 1.0, -1.0)
