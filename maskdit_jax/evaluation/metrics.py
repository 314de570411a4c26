"""Numbers about samples, from what an extractor makes of them; METRICS lists them. Float64, no images."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from maskdit_jax.errors import UserError
from maskdit_jax.evaluation.manifold import density_coverage, precision_recall

MAX_SIZE = 2**14  # of features; their covariance is 2 GiB


class Moments:
    """Mean and covariance of features that come in batches and are not kept."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: np.ndarray | float = 0.0
        self._scatter: np.ndarray | float = 0.0  # sum of (x - mean)·(x - mean)ᵀ

    def add(self, features: np.ndarray) -> None:
        """Take features [B, D] in, of any real type.

        Raises:
          UserError: D is too large for a covariance.
        """
        if features.shape[1] > MAX_SIZE:
            raise UserError(
                f"features of {features.shape[1]:,} values for each image have too large a covariance: at "
                f"most {MAX_SIZE:,} can be; use features=inception"
            )
        x = np.asarray(features, np.float64)
        mean, count = x.mean(axis=0), self.count + len(x)
        # Of each batch around its own mean, so that no sum of squares is large (Chan et al. 1979, eq. 2.1).
        step = mean - self._mean
        x = x - mean
        self._scatter += x.T @ x + (self.count * len(x) / count) * np.outer(step, step)
        self._mean += step * (len(x) / count)
        self.count = count

    @property
    def mean(self) -> np.ndarray:
        """Mean [D], float64."""
        return np.asarray(self._mean)

    @property
    def cov(self) -> np.ndarray:
        """Covariance [D, D], divided by n - 1, float64.

        Raises:
          UserError: of fewer than two items there is none.
        """
        if self.count < 2:
            raise UserError(f"statistics of {self.count} images have no covariance: take at least 2")
        return np.asarray(self._scatter) / (self.count - 1)


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] (divided by n - 1) of features [n, D], in float64."""
    moments = Moments()
    moments.add(features)
    return moments.mean, moments.cov


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|mean1 - mean2|² + tr(cov1 + cov2 - 2·(cov1·cov2)^½), the squared Fréchet distance of two Gaussians.

    The trace of the root is the sum of the singular values of root1ᵀ·root2, where root·rootᵀ = cov comes
    from the eigenvalues of the symmetric cov: singular covariances do not upset it (FID: arXiv 1706.08500).
    """
    trace_of_root = np.linalg.svd(_root(cov1).T @ _root(cov2), compute_uv=False).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root)


def _root(cov: np.ndarray) -> np.ndarray:
    """[D, r] whose product with its transpose is cov [D, D], r its numerical rank."""
    values, vectors = np.linalg.eigh(np.asarray(cov, np.float64))
    # What is below is rounding, of either sign: as roots a thousand such values would be seen in the sum.
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


class InceptionScore:
    """exp of the mean KL divergence of p(class | image) from its mean, per split; the mean over splits.

    As ADM computes it (arXiv 1606.03498 with splits of 5,000 images in their order; a shorter last split
    counts like the others).
    """

    def __init__(self, split: int = 5000):
        self._split = split
        self._count, self._entropy = 0, 0.0  # of the split under way; the latter sums Σ p·log p
        self._sum: np.ndarray | float = 0.0  # of p [K]
        self._scores: list[float] = []

    def add(self, logits: np.ndarray) -> None:
        """Take logits [B, K] in."""
        rest = np.asarray(logits, np.float64)
        while len(rest):
            part, rest = np.split(rest, [self._split - self._count])
            shifted = part - part.max(axis=1, keepdims=True)
            log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            p = np.exp(log_p)
            self._sum += p.sum(axis=0)
            self._entropy += float((p * log_p).sum())
            self._count += len(part)
            if self._count == self._split:
                self._scores.append(self._score())
                self._count, self._sum, self._entropy = 0, 0.0, 0.0

    def _score(self) -> float:
        mean = np.asarray(self._sum) / self._count
        # 0·log 0 = 0, where no image of the split has any of a class.
        return float(np.exp(self._entropy / self._count - (mean * np.log(np.where(mean, mean, 1))).sum()))

    def value(self) -> float:
        """The score of all that was taken in."""
        return float(np.mean(self._scores + ([self._score()] if self._count else [])))


def kernel_distance(
    real: np.ndarray, samples: np.ndarray, subset: int = 1000, num_subsets: int = 100, seed: int = 0
) -> float:
    """KID (arXiv 1801.01401): unbiased squared MMD of features [m, D] and [n, D], kernel (x·y / D + 1)³.

    The mean over `num_subsets` random subsets of so many of each, drawn by the seed; of sets that are no
    larger, the estimate from all of them.

    Raises:
      UserError: a set has fewer than two.
    """
    if min(len(real), len(samples)) < 2:
        raise UserError(f"KID of {len(real)} real images and {len(samples)} samples: take at least 2 of each")
    real, samples = (np.asarray(x) for x in (real, samples))
    if max(len(real), len(samples)) <= subset:
        return _squared_mmd(real, samples)
    rng = np.random.default_rng(seed)
    estimates = []
    for _ in range(num_subsets):
        parts = (x[rng.choice(len(x), min(len(x), subset), replace=False)] for x in (real, samples))
        estimates.append(_squared_mmd(*parts))
    return float(np.mean(estimates))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    x, y = (np.asarray(features, np.float64) for features in (x, y))

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        plus_1 = a @ b.T / a.shape[1] + 1
        return plus_1 * plus_1 * plus_1  # a power would take most of the time

    def mean_of_pairs(a: np.ndarray) -> float:
        k, n = kernel(a, a), len(a)
        return (k.sum() - np.trace(k)) / (n * (n - 1))

    return float(mean_of_pairs(x) + mean_of_pairs(y) - 2 * kernel(x, y).mean())


class Features:
    """Features that are kept, because a metric needs all of them at once: 4·D bytes for each image."""

    def __init__(self) -> None:
        self._batches: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        """Take features [B, D] in."""
        self._batches.append(np.asarray(features, np.float32))

    def all(self) -> np.ndarray:
        """All of them [n, D] float32."""
        self._batches = [np.concatenate(self._batches)]
        return self._batches[0]


class Metric(NamedTuple):
    """One number: how it is called, and how it comes about.

    part: what of an extractor's output it is of; collects: the type that takes this part in, batch by
    batch, shared between metrics; compute(collected, reference): the values of all metrics that come from
    the same computation, by name; `reference` is a `Reference`.
    """

    label: str
    part: str
    higher_is_better: bool
    collects: type[Moments] | type[InceptionScore] | type[Features]
    compute: Callable[[Any, Any], dict[str, float]]

    @property
    def streams(self) -> bool:
        """Whether features need not be kept."""
        return self.collects is not Features

    @property
    def compares(self) -> str:
        """What it needs of a reference: "moments", "features" or nothing, ""."""
        return {Moments: "moments", Features: "features", InceptionScore: ""}[self.collects]


def _frechet(name: str, part: str) -> Callable[[Any, Any], dict[str, float]]:
    return lambda x, reference: {name: frechet_distance(x.mean, x.cov, *reference.moments[part])}


def _precision_recall(x: Features, reference: Any) -> dict[str, float]:
    return dict(zip(("precision", "recall"), precision_recall(reference.features, x.all())))


def _density_coverage(x: Features, reference: Any) -> dict[str, float]:
    return dict(zip(("density", "coverage"), density_coverage(reference.features, x.all())))


METRICS = {
    "fid": Metric("FID", "pool", False, Moments, _frechet("fid", "pool")),
    "sfid": Metric("sFID", "spatial", False, Moments, _frechet("sfid", "spatial")),  # arXiv 2103.03841
    "inception_score": Metric(
        "IS", "logits", True, InceptionScore, lambda x, reference: {"inception_score": x.value()}
    ),
    "kid": Metric("KID", "pool", False, Features, lambda x, r: {"kid": kernel_distance(r.features, x.all())}),
    "precision": Metric("precision", "pool", True, Features, _precision_recall),
    "recall": Metric("recall", "pool", True, Features, _precision_recall),
    "density": Metric("density", "pool", True, Features, _density_coverage),
    "coverage": Metric("coverage", "pool", True, Features, _density_coverage),
}
