"""Start from other weights: of the same network, or of one whose positions or classes are others."""

import math
from typing import Any

import jax

from maskdit_jax.config import ConfigDict, method_of
from maskdit_jax.errors import UserError
from maskdit_jax.log import log
from maskdit_jax.methods.method import Params
from maskdit_jax.options import as_section
from maskdit_jax.training.build import Training
from maskdit_jax.training.checkpoint import open_run
from maskdit_jax.training.meta import WEIGHTS
from maskdit_jax.training.state import EMA, TrainState

# By these names a network says what of it depends on the classes, and on the resolution: see models/embed.py.
CLASSES, POSITIONS = "label_embedding", "positions"


def start_from(config: ConfigDict, training: Training) -> TrainState:
    """A fresh state with the weights of the run or import in the folder `config.init_from`.

    Learned positions of another resolution are interpolated, a table of other classes is made anew;
    everything else must be the same network.

    Raises:
      UserError: the folder holds no weights, or those of another network.
    """
    folder, chosen = config.init_from, config.init_weights
    checkpoints = open_run(folder)

    def restore(step: int, meta: dict[str, Any]) -> dict[str, Params]:
        saved = ConfigDict(meta["config"])
        check_same_network(saved, config, folder, "channels")
        here, there = config.data.image_size, saved.data.image_size
        if here != there:
            log.info(f"init_from: data.image_size={here} here, {there} there")
        wanted = WEIGHTS if chosen == "both" else (chosen,)
        return {name: checkpoints.restore_weights(step, meta, name, training.mesh) for name in wanted}

    step, _, sets = checkpoints.healthy(config.init_step or None, restore)
    checkpoints.close()
    if _shapes(next(iter(sets.values()))) != _shapes(training.state_shapes.params):
        fresh = training.start(None).params
        notes: list[str] = []
        old, sets = sets, {name: adapt(params, fresh, notes) for name, params in sets.items()}
        for note in dict.fromkeys(notes):
            log.info(note)
        log.info(_kept(*(_shapes(next(iter(x.values()))) for x in (old, sets))))
    state = training.start(sets["params" if chosen == "both" else chosen])
    if chosen == "both":
        state = state._replace(ema={EMA: sets["ema"]})
    words = {"both": "weights and EMA", "params": "raw weights", "ema": "EMA"}[chosen]
    alone = "" if chosen == "both" else ", from which the EMA starts too,"
    log.info(f"{words}{alone} from step {step:,} of {folder}; the optimizer starts fresh")
    return state


def check_same_network(saved: ConfigDict, config: ConfigDict, where: str, *shape: str) -> None:
    """Compare two resolved configurations in the network, and in those names of the data's shape.

    Raises:
      UserError: they differ; the message names each difference.
    """

    def decisive(c: ConfigDict) -> dict[str, Any]:
        network = as_section(method_of(c).network)
        network.pop("size", None)  # a name for the numbers beside it
        options = {f"method.network.{name}": value for name, value in network.items()}
        return {"method.name": c.method.name} | options | {f"data.{name}": c.data[name] for name in shape}

    old, new = decisive(saved), decisive(config)
    differences = [f"{k}={new[k]} here, {old.get(k)} there" for k in new if old.get(k) != new[k]]
    if old["method.name"] != new["method.name"]:
        differences = differences[:1]
    if differences:
        raise UserError(f"the model differs from the one in {where}: {'; '.join(differences)}")


def adapt(saved: Params, fresh: Params, notes: list[str]) -> Params:
    """`saved` parameters in the shapes of `fresh` ones, placed like them; `notes` gets what was changed.

    Raises:
      UserError: they differ in something that is neither positions nor classes.
    """
    leaves, tree = jax.tree.flatten_with_path(fresh)
    old = {_name(path): x for path, x in jax.tree.leaves_with_path(saved)}
    adapted = [_adapt_leaf(_name(path), old.pop(_name(path), None), x, notes) for path, x in leaves]
    for name in old:
        if CLASSES not in name.split("."):
            raise UserError(f"init_from: this network has no {name}")
        notes.append(f"init_from: {CLASSES} is left out: this run is unconditional")
    return jax.tree.unflatten(tree, adapted)


def _adapt_leaf(name: str, old: jax.Array | None, new: jax.Array, notes: list[str]) -> jax.Array:
    parts = name.split(".")
    if old is not None and old.shape == new.shape:
        return old
    if CLASSES in parts:
        notes.append(f"init_from: {name} {list(new.shape)} is made anew: the classes are others")
        return new
    if POSITIONS in parts and old is not None and _but_places(old) == _but_places(new):
        sides = math.isqrt(old.shape[-2]), math.isqrt(new.shape[-2])
        notes.append(
            "init_from: {} is interpolated from {}×{} to {}×{}".format(
                name, *(side for side in sides for _ in range(2))
            )
        )
        return jax.jit(_interpolated, static_argnums=(1, 2), out_shardings=new.sharding)(old, *sides)
    found = "no such parameter" if old is None else f"one of shape {list(old.shape)}"
    raise UserError(f"init_from: {name} has shape {list(new.shape)} here, there is {found} there")


def _but_places(table: jax.Array) -> tuple[int, ...]:
    return (*table.shape[:-2], *table.shape[-1:])


def _interpolated(table: jax.Array, old_side: int, new_side: int) -> jax.Array:
    """Positions [..., new_side², D] of a table [..., old_side², D], bicubic on the grid of its places."""
    stack, width = table.shape[:-2], table.shape[-1]
    grid = table.reshape(*stack, old_side, old_side, width)
    resized = jax.image.resize(grid, (*stack, new_side, new_side, width), "cubic")
    return resized.reshape(*stack, new_side**2, width)


def _name(path: tuple) -> str:
    return ".".join(str(key.key) for key in path)


def _kept(old: dict[str, tuple[int, ...]], new: dict[str, tuple[int, ...]]) -> str:
    """What `adapt` took as it was."""
    kept = [name for name, shape in new.items() if old.get(name) == shape]
    values = sum(math.prod(new[name]) for name in kept)
    return f"init_from: {len(kept)} of {len(new)} arrays, {values:,} values, are kept as they are"


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    return {_name(path): x.shape for path, x in jax.tree.leaves_with_path(params)}
