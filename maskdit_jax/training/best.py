"""The weights that measured best so far, in a folder of their own beside the checkpoints."""

import math
from pathlib import Path
from typing import Any

from maskdit_jax.errors import UserError
from maskdit_jax.log import log
from maskdit_jax.training.checkpoint import Checkpoints
from maskdit_jax.training.state import EMA, TrainState

FOLDER = "best"


class Best:
    """Keeps in `workdir/best` the weights and EMA of the step with the smallest score.

    The folder serves `load`, `sample`, exports and `init_from` like that of a run; it appears whole, holds
    no training state, and says in meta["best"] by what it was chosen. A run that goes on compares with what
    is there. Every process of a run calls the same methods in the same order.
    """

    def __init__(self, workdir: Path, metric: str, reference: str):
        self._checkpoints = Checkpoints(workdir / FOLDER, keep=1)
        self._chosen_by = {"metric": metric, "reference": reference}
        self.step, self.score = max(self._checkpoints.steps, default=0), math.inf
        if not self.step:
            return
        try:
            best = self._checkpoints.newest_healthy(lambda *_: None)[1].get("best", {})
        except UserError as error:
            log.warning(f"warning: {error}; the next measurement takes its place")
            return
        if {name: best.get(name) for name in self._chosen_by} == self._chosen_by:
            self.score = best["score"]
            log.info(f"best so far: {metric} {self.score:.4f} at step {self.step:,}")
        else:
            log.info(f"{workdir / FOLDER} was chosen by another measurement, and will be replaced")

    def offer(self, score: float, state: TrainState, meta: dict[str, Any]) -> bool:
        """Keep the weights of a state if they are better; `meta` as of a checkpoint of it.

        Steps that were measured before a run was stopped are not kept again. What cannot be written is
        reported, and the best before stays.
        """
        step = int(state.step)
        if not score < self.score or step <= self.step:  # NaN is never better
            return False
        weights = {"params": state.params, "ema_params": state.ema[EMA]}
        meta = meta | {"best": self._chosen_by | {"score": score}}
        try:
            self._checkpoints.save_weights(step, weights, meta)
        except UserError:  # of which the checkpoints have told
            return False
        self.step, self.score = step, score
        return True

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._checkpoints.close()
