"""Distances between sets of features; METRICS lists those of the card."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class FeatureSets(NamedTuple):
    """What samples are compared with, [n, D] each: held-out real images, and those of the training."""

    held_out: np.ndarray
    training: np.ndarray


def feature_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] (divided by n - 1) of features [n, D], in float64."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """|mean1 - mean2|² + tr(cov1 + cov2 - 2·(cov1·cov2)^½), the squared Fréchet distance of two Gaussians.

    The trace of the root comes from the eigenvalues of the symmetric matrix cov1^½·cov2·cov1^½,
    which singular covariances do not upset (FID: arXiv 1706.08500).
    """
    # Rounding makes eigenvalues that are zero slightly negative, and their roots NaN: hence the clips.
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov2 @ root)
    trace_of_root = np.sqrt(np.clip(product, 0, None)).sum()
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root)


def nearest_distance(features: np.ndarray, others: np.ndarray) -> float:
    """Mean over features [n, D] of the Euclidean distance to the nearest of the others [m, D]."""
    a, b = np.asarray(features, np.float64), np.asarray(others, np.float64)
    squared = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
    return float(np.sqrt(np.clip(squared.min(axis=1), 0, None)).mean())


METRICS: dict[str, Callable[[np.ndarray, FeatureSets], float]] = {
    "frechet_distance": lambda x, sets: frechet_distance(
        *feature_statistics(x), *feature_statistics(sets.held_out)
    ),
    "nearest_training_image": lambda x, sets: nearest_distance(x, sets.training),
}
