"""Sets of features as manifolds: balls around their points, nearest neighbours. Blockwise, float32."""

from collections.abc import Iterator

import numpy as np

from maskdit_jax.errors import UserError

BLOCK_BYTES = 2**27  # squared distances held at once


def precision_recall(real: np.ndarray, samples: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of samples [n, D] of real features [m, D] (arXiv 1904.06991).

    Precision: share of samples inside a ball of a real point, whose radius is the distance to its k-th
    nearest other real point; recall: the same the other way round. Distances are compared squared, in
    float32, as in ADM's evaluator where it does not use half precision.

    Raises:
      UserError: a set has no k + 1 points.
    """
    inside_real, inside_samples = mutually_inside(real, samples, k)
    return float(inside_real.mean()), float(inside_samples.mean())


def density_coverage(real: np.ndarray, samples: np.ndarray, k: int = 5) -> tuple[float, float]:
    """Density and coverage of samples [n, D] of real features [m, D] (arXiv 2002.09797, eq. 3 and 4).

    Density: real balls around a sample, over k, in the mean; about 1 for real data, and not bounded by 1.
    Coverage: share of real balls in which there is a sample.

    Raises:
      UserError: the real set has no k + 1 points.
    """
    radii = squared_radii(real, k)
    balls, covered = 0, np.zeros(len(real), bool)
    for _, squared in _squared_distances(samples, real):
        inside = squared <= radii[None]
        balls += int(np.count_nonzero(inside))
        covered |= inside.any(axis=0)
    return float(balls / (k * len(samples))), float(covered.mean())


def squared_radii(features: np.ndarray, k: int) -> np.ndarray:
    """Squared distance [n] of each of the features [n, D] to its k-th nearest other one.

    Raises:
      UserError: there are no k others.
    """
    if len(features) <= k:
        raise UserError(
            f"{len(features)} images have no {k} nearest neighbours each: precision, recall, density and "
            f"coverage need at least {k + 1}"
        )
    # Of the k + 1 smallest the first is the zero to itself.
    return np.concatenate(
        [np.partition(squared, k, axis=1)[:, k] for _, squared in _squared_distances(features, features)]
    )


def nearest(features: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances [n], and places [n] among the others [m, D], of the nearest ones to features [n, D]."""
    places = np.concatenate([squared.argmin(axis=1) for _, squared in _squared_distances(features, others)])
    # Anew, as the expanded square of a small distance is mostly rounding.
    distances = [
        np.sqrt(np.sum((x.astype(np.float64) - others[place]) ** 2)) for x, place in zip(features, places)
    ]
    return np.array(distances), places


def mutually_inside(real: np.ndarray, samples: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Which samples [n] lie in a ball of a real point, and which real points [m] in one of a sample.

    Raises:
      UserError: a set has no k + 1 points.
    """
    real_radii, sample_radii = squared_radii(real, k), squared_radii(samples, k)
    inside_real, inside_samples = [], np.zeros(len(real), bool)
    for rows, squared in _squared_distances(samples, real):
        inside_real.append((squared <= real_radii[None]).any(axis=1))
        inside_samples |= (squared <= sample_radii[rows, None]).any(axis=0)
    return np.concatenate(inside_real), inside_samples


def _squared_distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Blocks of rows of a [n, D], and their squared distances [rows, m] to all of b [m, D], in float32."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    norms = np.square(b).sum(axis=1)
    at_once = max(BLOCK_BYTES // (4 * len(b)), 1)
    for start in range(0, len(a), at_once):
        rows = slice(start, start + at_once)
        squared = a[rows] @ b.T
        squared *= -2
        squared += np.square(a[rows]).sum(axis=1)[:, None]
        squared += norms[None]
        yield rows, np.maximum(squared, 0, out=squared)
