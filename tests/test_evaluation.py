"""Metrics: closed forms, singular covariances, parity with the published evaluator, bounded memory."""

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from golden_case import GOLDEN
from tiny import command_environment

from maskdit_jax.errors import UserError
from maskdit_jax.evaluation.features import Extractor
from maskdit_jax.evaluation.manifold import (
    density_coverage,
    mutually_inside,
    nearest,
    precision_recall,
    squared_radii,
)
from maskdit_jax.evaluation.measure import measure
from maskdit_jax.evaluation.metrics import (
    InceptionScore,
    Moments,
    feature_statistics,
    frechet_distance,
    kernel_distance,
)
from maskdit_jax.evaluation.reference import make_reference


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "metrics_adm_edm.npz")


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


def test_statistics_of_batches_are_those_of_all_at_once():
    """Also where the first batches are far from the rest, as images sorted by class are."""
    features = np.random.default_rng(0).standard_normal((100, 5)) + np.repeat([0, 1e4], 50)[:, None]
    moments = Moments()
    for batch in np.split(features, [1, 2, 30, 93]):
        moments.add(batch)
    assert moments.count == 100
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.cov, np.cov(features, rowvar=False), rtol=1e-9)


def test_one_image_has_no_covariance():
    with pytest.raises(UserError, match="of 1 images have no covariance"):
        feature_statistics(np.zeros((1, 3)))


def test_images_of_too_many_values_are_refused_before_their_covariance_is_allocated():
    with pytest.raises(UserError, match=r"features of 196,608 values .* too large a covariance"):
        feature_statistics(np.zeros((2, 256 * 256 * 3), np.float32))


@pytest.mark.parametrize("count", [20, 300])
def test_distance_of_a_set_with_itself_is_zero(count):
    """Fewer than its 32 dimensions too."""
    features = np.random.default_rng(0).standard_normal((count, 32)) @ rotation(32) + 5
    assert distance(features, features) == pytest.approx(0, abs=1e-9)


def test_fewer_samples_than_dimensions_equal_the_distance_within_the_space_that_they_span():
    """Two sets in one 5-dimensional space of 40 dimensions: the closed form there, in float64."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((40, 5)))[0]
    x, y = rng.standard_normal((12, 5)), rng.standard_normal((9, 5)) @ rng.standard_normal((5, 5)) + 1
    means, covs = zip(feature_statistics(x), feature_statistics(y))
    eigenvalues = np.linalg.eigvals(covs[0] @ covs[1])
    expected = np.sum((means[0] - means[1]) ** 2) + sum(np.trace(c) for c in covs)
    expected -= 2 * np.sqrt(eigenvalues.real).sum()
    assert distance(x @ basis.T, y @ basis.T) == pytest.approx(expected, rel=1e-9)


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
    "name, part, second, count, tolerance",
    [
        ("fid", "pool", "sample", None, 1e-6),
        ("sfid", "spatial", "sample", None, 1e-6),
        ("fid_edm", "pool", "sample", None, 1e-9),
        ("fid_self", "pool", "ref", None, 1e-9),
        ("fid_20_samples_each", "pool", "sample", 20, 1e-5),
    ],
)
def test_distance_is_the_published_evaluators(golden, name, part, second, count, tolerance):
    """ADM's and EDM's evaluators on the same features; 20 of 64 dimensions have singular covariances."""
    result = distance(golden[f"{part}_ref"][:count], golden[f"{part}_{second}"][:count])
    assert result == pytest.approx(float(golden[name]), rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", ["ref", "sample"])
def test_statistics_are_the_published_evaluators(golden, name):
    mean, cov = feature_statistics(golden[f"pool_{name}"])
    np.testing.assert_allclose(mean, golden[f"mu_{name}"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(cov, golden[f"sigma_{name}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("split", [5000, 100, 150])
def test_inception_score_is_the_published_evaluators(golden, split):
    """500 images in batches that no split divides; of 150 the last split is shorter."""
    score = InceptionScore(split)
    for batch in np.split(golden["logits"], [7, 180, 181, 450]):
        score.add(batch)
    assert score.value() == pytest.approx(float(golden[f"inception_score_split{split}"]), rel=1e-6)


def test_precision_and_recall_are_the_published_evaluators_in_float32(golden, monkeypatch):
    """Point for point, in blocks of 37 rows and some."""
    monkeypatch.setattr("maskdit_jax.evaluation.manifold.BLOCK_BYTES", 4 * 500 * 37)
    real, samples = golden["pool_ref"], golden["pool_sample"]
    np.testing.assert_allclose(squared_radii(real, 3), golden["pr_fp32/radii_ref"], rtol=1e-5)
    np.testing.assert_allclose(squared_radii(real, 3), golden["radii_ref_float64"], rtol=1e-5)
    np.testing.assert_allclose(squared_radii(samples, 3), golden["pr_fp32/radii_sample"], rtol=1e-5)
    inside_real, inside_samples = mutually_inside(real, samples, 3)
    np.testing.assert_array_equal(inside_real, golden["pr_fp32/sample_in_ref_manifold"])
    np.testing.assert_array_equal(inside_samples, golden["pr_fp32/ref_in_sample_manifold"])
    for kind, tolerance in (("pr_fp32", 0), ("pr_fp16", 0.005)):
        expected = [float(golden[f"{kind}/{name}"]) for name in ("precision", "recall")]
        assert list(precision_recall(real, samples)) == pytest.approx(expected, rel=0, abs=tolerance)


def test_density_counts_balls_and_coverage_those_that_hold_a_sample():
    """On a line: balls of radius 1 around 0, 1, 2, 3 and of 7 around 10, with k = 1."""
    real = np.array([[0], [1], [2], [3], [10.0]])
    samples = np.array([[1.5], [1.6], [5.0], [30.0]])
    # 1.5 and 1.6 are in the balls of 1 and 2, 5 in that of 10, 30 in none.
    assert density_coverage(real, samples, k=1) == ((2 + 2 + 1) / 4, 3 / 5)
    assert precision_recall(real, samples, k=1) == (3 / 4, 3 / 5)


def test_too_few_points_have_no_neighbours():
    with pytest.raises(UserError, match="3 images have no 3 nearest neighbours"):
        precision_recall(np.zeros((9, 2)), np.zeros((3, 2)))


def test_kernel_distance_is_the_sum_over_all_pairs(golden):
    """Of small sets the unbiased estimate itself; of larger ones the mean over random subsets comes near."""
    x, y = golden["pool_ref"].astype(np.float64), golden["pool_sample"].astype(np.float64)

    def mean_kernel(a, b, same=False):
        values = [
            (u @ v / 64 + 1) ** 3 for i, u in enumerate(a) for j, v in enumerate(b) if i != j or not same
        ]
        return np.mean(values)

    few = x[:30], y[:20]
    expected = mean_kernel(few[0], few[0], True) + mean_kernel(few[1], few[1], True) - 2 * mean_kernel(*few)
    assert kernel_distance(*few) == pytest.approx(expected, rel=1e-9)
    whole = kernel_distance(x, y)
    of_subsets = [kernel_distance(x, y, subset=200, num_subsets=20) for _ in range(2)]
    assert of_subsets[0] == of_subsets[1] == pytest.approx(whole, rel=0.1)


def test_nearest_is_that_of_all_pairs_and_zero_in_a_set_that_holds_it():
    a, b = np.random.default_rng(0).standard_normal((2, 7, 5)).astype(np.float32)
    pairs = np.sqrt(((a[:, None].astype(np.float64) - b[None]) ** 2).sum(axis=-1))
    distances, places = nearest(a, b)
    np.testing.assert_allclose(distances, pairs.min(axis=1), rtol=1e-12)
    np.testing.assert_array_equal(places, pairs.argmin(axis=1))
    distances, places = nearest(a, np.concatenate([b, a]))
    np.testing.assert_array_equal(distances, np.zeros(7))
    np.testing.assert_array_equal(places, np.arange(7, 14))


def test_metrics_that_stream_keep_no_features():
    """50,000 images of 64 features: 12.8 MB; others keep just these."""
    images = np.random.default_rng(0).standard_normal((500, 8, 8, 1)).astype(np.float32)
    extractor = Extractor("test", "", lambda x: {"pool": x.reshape(len(x), -1), "logits": x[:, :, 0, 0]})
    reference = make_reference([images], 500, extractor)

    def peak(*names: str) -> float:
        tracemalloc.start()
        measure((images + i / 1000 for i in range(100)), extractor, reference, names)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used / 1e6

    assert peak("fid", "inception_score") < 2
    assert peak("coverage") > 12.8


# The peak of the process's own memory: ru_maxrss would be at least that of the one that started it.
AT_FULL_SIZE = """
import re
import numpy as np
from maskdit_jax.evaluation.manifold import precision_recall
draw = np.random.default_rng(0).standard_normal
features = [draw((n, 2048), np.float32) for n in (20_000, 10_000)]
print(precision_recall(*features), re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
def test_precision_of_20000_by_10000_points_of_2048_dimensions_takes_less_than_4_gib():
    done = subprocess.run(
        [sys.executable, "-c", AT_FULL_SIZE],
        env=command_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout.split()[-1]) * 1024 < 4 * 2**30
