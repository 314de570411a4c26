"""What a checkpoint says of itself: checked when it is read, as what is foreign."""

import hashlib
import json
import math
from typing import Any

from maskdit_jax.data.shards import checked_class_names
from maskdit_jax.errors import UserError, shown
from maskdit_jax.saved_config import saved_config

# The two sets of weights by the names of the flags, and the items that hold them.
WEIGHTS = {"ema": "ema_params", "params": "params"}


def checked_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """What `Checkpoints.save` or `save_weights` was given, its configuration in today's layout.

    Raises:
      UserError: something else is there.
    """
    meta = meta | {"config": saved_config(meta.get("config")).to_dict()}
    if not meta["digests"].keys() & WEIGHTS.values():
        raise UserError("it has digests of no weights")
    checked_class_names(meta.get("class_names", []), meta["config"]["data"]["num_classes"])
    if "imported_from" in meta:
        return meta
    items, seconds = meta.get("items_consumed"), meta.get("seconds")
    if type(items) is not int or not 0 <= items < 2**63:
        raise UserError(f"items_consumed={shown(items)}, expected a whole number")
    if type(seconds) is not float or not 0 < seconds < math.inf:
        raise UserError(f"seconds={shown(seconds)}, expected a number above 0")
    if "best" in meta:
        _check_best(meta["best"])
    return meta


def _check_best(best: Any) -> None:
    """What training/best.py says of the weights that it keeps."""
    kinds = {"metric": str, "reference": str, "score": float}
    if not isinstance(best, dict) or any(type(best.get(name)) is not kind for name, kind in kinds.items()):
        raise UserError(f"best={shown(best)}, expected {', '.join(kinds)}")
    if not math.isfinite(best["score"]):
        raise UserError(f"best: score={best['score']}, expected a finite number")


def meta_digest(meta: dict[str, Any]) -> str:
    """Of all that a checkpoint says of itself, but for this digest."""
    digests = {name: value for name, value in meta["digests"].items() if name != "meta"}
    return hashlib.sha256(json.dumps(meta | {"digests": digests}, sort_keys=True).encode()).hexdigest()
