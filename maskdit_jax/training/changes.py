"""A run goes on with other options: which are free, listed, and refused: it would be another run."""

from typing import Any

from maskdit_jax.config import ConfigDict, defaults, leaves
from maskdit_jax.errors import UserError, shown
from maskdit_jax.log import log

# FREE: what is trained stays the same. LISTED: what a person turns while a run goes on. REFUSED: the rest.
FREE, LISTED, REFUSED = "free", "listed", "refused"
# By full name, or for a whole section. What is not here is refused, so no option can be forgotten: the seed
# and the data, which the position in them is of; the batch, which counts it; noise and losses; what the EMA
# and the optimizer's moments are averages of; the weights that the run has started from.
AT_RESTART = {
    "vae": FREE,  # shows samples
    "data.num_threads": FREE,
    "data.max_unreadable": FREE,
    # The same computation up to rounding; but precision is a person's choice about a run that diverges.
    "compute": FREE,
    "compute.precision": LISTED,
    "training.accumulate": FREE,
    "training.num_steps": LISTED,
    "training.max_nonfinite_steps": FREE,
    "optimizer.learning_rate": LISTED,
    "optimizer.warmup_kimg": LISTED,
    "optimizer.weight_decay": LISTED,
    "optimizer.clip_norm": LISTED,
    "mesh": FREE,
    "checkpoint": FREE,
    "report": FREE,
    "evaluation": FREE,
    "sampling": FREE,
}
# `check_same_network` compares it by its numbers, and no flag lets another one pass.
_NETWORK = ("method.name", "method.network.")


def at_restart(name: str) -> str:
    """FREE, LISTED or REFUSED: what becomes of a run that goes on with another value of an option."""
    return AT_RESTART.get(name, AT_RESTART.get(name.partition(".")[0], REFUSED))


def check_changes(saved: ConfigDict, config: ConfigDict, where: str, *, allow: bool) -> None:
    """Compare resolved configurations of a run: as it was saved, and as it is to go on.

    Raises:
      UserError: an option differs that makes it another run, and that is not allowed.
    """
    old, new = leaves(defaults(config.method.name)) | leaves(saved), leaves(config)
    changed: dict[str, list[str]] = {FREE: [], LISTED: [], REFUSED: []}
    for name, value in new.items():
        if not name.startswith(_NETWORK) and old.get(name) != value:
            changed[at_restart(name)].append(f"{name}={_text(value)}, before {_text(old.get(name))}")
    if changed[REFUSED] and not allow:
        raise UserError(
            f"{where} would go on as another run: {'; '.join(changed[REFUSED])}; give the options it began "
            "with, train in a new folder, or pass --allow_changes"
        )
    if listed := changed[REFUSED] + changed[LISTED]:
        log.info(f"changed since the checkpoint: {'; '.join(listed)}")


def _text(value: Any) -> str:
    return shown(repr(value) if value == "" else value)
