"""The Fréchet distance: closed forms, singular covariances, parity with the published evaluator."""

import numpy as np
import pytest
from golden_case import GOLDEN

from maskdit_jax.evaluation.metrics import feature_statistics, frechet_distance, nearest_distance


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "frechet.npz")


def distance(features1: np.ndarray, features2: np.ndarray) -> float:
    return frechet_distance(*feature_statistics(features1), *feature_statistics(features2))


def rotation(size: int) -> np.ndarray:
    """Some orthogonal matrix [size, size]."""
    return np.linalg.qr(np.random.default_rng(0).standard_normal((size, size)))[0]


def test_statistics_are_the_mean_and_the_unbiased_covariance():
    mean, cov = feature_statistics(np.array([[1, 2], [3, 2], [5, 8]], np.float32))
    np.testing.assert_allclose(mean, [3, 4])
    np.testing.assert_allclose(cov, [[4, 6], [6, 12]])


def test_statistics_of_float32_features_are_float64():
    """Around a large mean, float32 would lose the variance of 1e-4."""
    features = 1000 + np.random.default_rng(0).integers(0, 2, (4000, 1)).astype(np.float32) / 64
    mean, cov = feature_statistics(features)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(cov, np.var(features.astype(np.float64) - 1000, ddof=1), rtol=1e-9)


def test_distance_of_a_set_with_itself_is_zero():
    features = np.random.default_rng(0).standard_normal((300, 32)) @ rotation(32) + 5
    assert distance(features, features) == pytest.approx(0, abs=1e-9)


def test_equal_covariances_leave_the_squared_distance_of_the_means():
    features = np.random.default_rng(0).standard_normal((300, 16))
    shift = np.arange(16) / 4
    assert distance(features, features + shift) == pytest.approx(np.sum(shift**2), rel=1e-9)


@pytest.mark.parametrize("basis", [np.eye(4), rotation(4)], ids=["diagonal", "commuting"])
def test_gaussians_whose_covariances_commute(basis):
    """|mean1 - mean2|² + Σ (std1 - std2)² along the common axes."""
    mean1, mean2 = np.array([0, 1, 2, 3.0]), np.array([1, -1, 2, 0.5])
    std1, std2 = np.array([0.1, 1, 2, 30]), np.array([0.3, 1, 0.5, 7])
    cov1, cov2 = (basis @ np.diag(std**2) @ basis.T for std in (std1, std2))
    expected = np.sum((mean1 - mean2) ** 2) + np.sum((std1 - std2) ** 2)
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-9)


def test_gaussians_whose_covariances_do_not_commute():
    """In two dimensions tr (A·B)^½ = √(tr(A·B) + 2·√det(A·B))."""
    a, b = np.array([[2, 0.5], [0.5, 1]]), np.array([[1, -0.7], [-0.7, 3]])
    assert not np.allclose(a @ b, b @ a)
    trace_of_root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    expected = np.trace(a) + np.trace(b) - 2 * trace_of_root
    assert frechet_distance(np.zeros(2), a, np.zeros(2), b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(np.zeros(2), b, np.zeros(2), a) == pytest.approx(expected, rel=1e-9)


def test_gaussians_on_orthogonal_lines():
    """Singular covariances without common directions: nothing but the two variances remains."""
    cov1, cov2 = np.diag([4.0, 0, 0]), np.diag([0, 9.0, 0])
    assert frechet_distance(np.zeros(3), cov1, np.zeros(3), cov2) == pytest.approx(13, rel=1e-12)


@pytest.mark.parametrize(
    "name, second, count, tolerance",
    [
        ("fid", "pool_sample", None, 1e-6),
        ("fid_self", "pool_ref", None, 1e-9),
        ("fid_20_samples_each", "pool_sample", 20, 1e-5),
    ],
)
def test_distance_is_the_published_evaluators(golden, name, second, count, tolerance):
    """ADM's evaluator on the same features; 20 samples of 64 features have singular covariances."""
    result = distance(golden["pool_ref"][:count], golden[second][:count])
    assert result == pytest.approx(float(golden[name]), rel=tolerance, abs=tolerance)


def test_nearest_distance_is_that_of_all_pairs_and_zero_to_a_set_that_holds_it():
    a, b = np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32)
    pairs = np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(axis=-1))
    assert nearest_distance(a, b) == pytest.approx(pairs.min(axis=1).mean(), rel=1e-9)
    assert nearest_distance(a, np.concatenate([b, a])) == pytest.approx(0, abs=1e-6)
