"""How near solvers come to the exact path of a model, over the number of network calls."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from maskdit_jax.diffusion.solvers import SOLVERS
from maskdit_jax.errors import UserError, known
from maskdit_jax.evaluation.features import PIXELS
from maskdit_jax.evaluation.metrics import feature_statistics, frechet_distance
from maskdit_jax.log import log
from maskdit_jax.sampling import Model

EXACT = {"solver": "heun", "num_steps": 200}  # as good as the end of the path


def compare_solvers(
    model: Model,
    solvers: Sequence[str],
    calls: Sequence[int],
    *,
    num_seeds: int = 256,
    labels: np.ndarray | None = None,
    real: np.ndarray | None = None,
    num_frechet: int = 1437,
    batch_size: int = 512,
    **options: Any,
) -> list[dict[str, Any]]:
    """For each solver and number of calls of the denoiser, how far samples are from their exact ends.

    distance: mean over seeds 0 … num_seeds - 1 of the root mean square over an image's values of the
    difference from the 200-step Heun solution from the same noise. frechet_distance: of the pixels of
    num_frechet samples to those of `real` [m, H, W, C], where they are given. nfe: evaluations of the network
    for an image, which are twice the calls where all of them are guided.

    Args:
      calls: of the denoiser; a solver takes the most steps that need no more.
      labels: of the samples in turn; by default those of `Model.sample`.
      options: of the sampler, the same for all.

    Raises:
      UserError: a solver or option that does not exist.
    """
    for solver in solvers:
        if solver not in SOLVERS:
            raise UserError(f"solver={solver!r} is unknown; known: {known(solver, SOLVERS)}")
    seeds = np.arange(max(num_seeds, num_frechet if real is not None else 0))
    given = np.resize(labels, len(seeds)) if labels is not None else model.check_labels(seeds, None)
    at_once = -(-batch_size // model.mesh.size)

    def sample(count: int, **chosen: Any) -> np.ndarray:
        return model.sample(seeds[:count], given[:count], batch_size=at_once, **options | chosen)

    exact, rows = sample(num_seeds, **EXACT), []
    for solver in solvers:
        for num_steps in sorted({_steps_of(solver, number) for number in calls}):
            chosen = {"solver": solver, "num_steps": num_steps}
            images = sample(len(seeds), **chosen)
            error = (images[:num_seeds] - exact).astype(np.float64)
            distance = np.sqrt(np.square(error).mean(axis=(1, 2, 3))).mean()
            row = chosen | {"nfe": model.nfe(**options | chosen), "distance": float(distance)}
            if real is not None:
                row["frechet_distance"] = _frechet_distance(images[:num_frechet], real)
            log.info(describe_row(row))
            rows.append(row)
    return rows


def describe_row(row: dict[str, Any]) -> str:
    """A row for a person."""
    frechet = f"  Fréchet distance {row['frechet_distance']:.4f}" if "frechet_distance" in row else ""
    return (
        f"{row['solver']:<10} {row['num_steps']:>4} steps {row['nfe']:>4} network calls  "
        f"distance {row['distance']:.3e}{frechet}"
    )


def _steps_of(solver: str, calls: int) -> int:
    """The most steps that need no more calls: Heun's take two each but for the last."""
    return max((calls + 1) // 2 if solver == "heun" else calls, 1)


def _frechet_distance(images: np.ndarray, real: np.ndarray) -> float:
    (mean1, cov1), (mean2, cov2) = (feature_statistics(PIXELS.extract(x)["pool"]) for x in (images, real))
    return frechet_distance(mean1, cov1, mean2, cov2)
