"""Checkpoints of a run, written by Orbax in the background: state, position in the data, configuration."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from maskdit_jax.config import ConfigDict
from maskdit_jax.errors import UserError
from maskdit_jax.training.state import Params, TrainState

FOLDER = "checkpoints"
# The two sets of weights by the names of the flags, and the items that hold them.
WEIGHTS = {"ema": "ema_params", "params": "params"}
_ARRAYS = ("params", "ema_params", "opt_state")


class Checkpoints:
    """The checkpoints under `workdir/checkpoints`, one folder per step.

    A step holds the items params, ema_params, opt_state, counters and meta (JSON: configuration,
    items consumed, seconds trained). It appears in one rename, when all of it is on disk. An import
    holds no training state, but weights and meta alone, and says so in meta["imported_from"].
    """

    def __init__(self, workdir: str | Path, keep: int | None = None):
        self.folder = Path(workdir).absolute() / FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    @property
    def latest_step(self) -> int | None:
        """Number of the newest step, None when there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Start to write a step; returns when the arrays are copied, so that they may be donated."""
        counters = {
            "nonfinite_in_row": state.nonfinite_in_row,
            "nonfinite_total": state.nonfinite_total,
            "step": state.step,
        }
        arrays = {name: ocp.args.StandardSave(getattr(state, name)) for name in _ARRAYS}
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                **arrays,
                counters=ocp.args.StandardSave(counters),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def save_weights(self, step: int, weights: dict[str, Params], meta: dict[str, Any]) -> None:
        """Start to write a step that holds weights only: `params`, `ema_params` or both."""
        items = {name: ocp.args.StandardSave(params) for name, params in weights.items()}
        self._manager.save(step, args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)))

    def restore(self, shapes: TrainState) -> TrainState:
        """The newest state, placed as the ShapeDtypeStructs of `shapes` say."""
        counters = {
            "nonfinite_in_row": shapes.nonfinite_in_row,
            "nonfinite_total": shapes.nonfinite_total,
            "step": shapes.step,
        }
        arrays = {name: ocp.args.StandardRestore(getattr(shapes, name)) for name in _ARRAYS}
        items = self._manager.restore(
            self.latest_step,
            args=ocp.args.Composite(**arrays, counters=ocp.args.StandardRestore(counters)),
        )
        return TrainState(**{name: items[name] for name in _ARRAYS}, **items["counters"])

    def restore_weights(self, item: str, shapes: Params, step: int | None = None) -> Params:
        """`params` or `ema_params` alone, of the newest step or of `step`; one set stands for both.

        Raises:
          UserError: the step is no longer there.
        """
        step = self.latest_step if step is None else step
        if step not in self._manager.all_steps():
            raise UserError(f"{self.folder} no longer holds step {step:,}; newest: {self.latest_step:,}")
        if not (self.folder / str(step) / item).is_dir():
            (item,) = (name for name in WEIGHTS.values() if name != item)
        args = ocp.args.Composite(**{item: ocp.args.StandardRestore(shapes)})
        return self._manager.restore(step, args=args)[item]

    def meta(self) -> dict[str, Any]:
        """What the newest step says of itself."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(self.latest_step, args=args)["meta"]

    def close(self) -> None:
        """Wait until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def open_run(workdir: str | Path) -> tuple[Checkpoints, ConfigDict]:
    """Checkpoints of an existing run, and its configuration.

    Raises:
      UserError: the folder holds no checkpoint.
    """
    checkpoints = Checkpoints(workdir) if (Path(workdir) / FOLDER).is_dir() else None
    if checkpoints is None or checkpoints.latest_step is None:
        raise UserError(f"{workdir} is not the folder of a run: it has no checkpoint in {FOLDER}/")
    return checkpoints, ConfigDict(checkpoints.meta()["config"])


def check_same_model(saved: ConfigDict, config: ConfigDict, where: str) -> None:
    """Compare two resolved configurations in what decides the shapes of the parameters.

    Raises:
      UserError: they differ; the message names each difference.
    """
    free = ("size", "precision", "remat", "unroll")

    def parts(c):
        decisive = {k: v for k, v in c.model.items() if k not in free}
        return decisive | {"mask token (mae_coef > 0)": c.diffusion.mae_coef > 0}

    old, new = parts(saved), parts(config)
    differences = [f"{k}={new[k]} here, {old[k]} there" for k in new if old.get(k) != new[k]]
    if differences:
        raise UserError(f"the model differs from the one in {where}: {'; '.join(differences)}")
