"""Checkpoints of a run: written by Orbax in the background, and never trusted unread: all carry digests."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from maskdit_jax.config import ConfigDict, compute_of, method_of, shape_of
from maskdit_jax.distributed.digest import digest
from maskdit_jax.distributed.hosts import everywhere, from_first
from maskdit_jax.distributed.mesh import place_shapes
from maskdit_jax.errors import UserError, first_line, shown
from maskdit_jax.files import MAX_JSON_BYTES, check_folder
from maskdit_jax.log import log
from maskdit_jax.methods.method import Params, init_params
from maskdit_jax.training.meta import WEIGHTS, checked_meta, meta_digest
from maskdit_jax.training.optimizer import with_clip, without_clip
from maskdit_jax.training.state import TrainState

FOLDER, DAMAGED_FOLDER = "checkpoints", "damaged"
# Orbax and TensorStore raise errors of any kind, bare `Exception` too, for files that are missing, cut
# short, altered or cannot be written; these do not speak of files.
_NOT_OF_FILES = (jax.errors.JaxRuntimeError, MemoryError)
# Of an array that several devices hold whole, Orbax lets each write a part. To cut it into smaller parts than
# this, by a program for each shape and device, takes longer than to write it.
_MIN_PART_BYTES = 2**20
T = TypeVar("T")


class DamagedError(UserError):
    """A checkpoint cannot be read back as it was written."""


class StructureError(UserError):
    """A checkpoint is sound, but of a run whose state has other arrays."""


class Checkpoints:
    """The checkpoints under `workdir/checkpoints`, one folder per step.

    A step holds the items params, ema_params, opt_state, counters and meta (JSON: configuration,
    items consumed, seconds trained, and a digest of every item, its own included). It appears in
    one rename, when all of it is on disk. An import holds no training state, but weights and meta
    alone, and says so in meta["imported_from"]; so do the best weights of a run, in meta["best"].

    With `keep` it is the run's writer: it keeps the newest `keep` steps and those that
    `keep_every_steps` divides, and removes what a killed writer left. Otherwise it only reads. Every
    process of a run calls the same methods in the same order.
    """

    def __init__(self, workdir: str | Path, keep: int | None = None, keep_every_steps: int = 0):
        self.folder = Path(workdir).absolute() / FOLDER
        check_folder(self.folder)
        check_folder(self.folder.parent / DAMAGED_FOLDER)
        if keep is None:
            self._options = ocp.CheckpointManagerOptions(create=False, lightweight_initialize=True)
        else:
            self._options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every_steps or None,
                cleanup_tmp_directories=True,
                # Without what Orbax writes of itself beside a step: damaged, it would hide all steps.
                lightweight_initialize=True,
            )
            handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_PART_BYTES)
            ocp.type_handlers.register_type_handler(jax.Array, handler, override=True)
        self._open()
        self._saving: int | None = None  # the step being written
        self._failure = ""  # of the newest attempt to write one

    def _open(self) -> None:
        # Not compressed: weights hardly shrink by it, and a restore would wait for it.
        arrays = ocp.PyTreeCheckpointHandler(use_compression=False)
        registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
        registry.add(None, ocp.args.PyTreeSave, arrays)
        registry.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        self._manager = ocp.CheckpointManager(self.folder, options=self._options, handler_registry=registry)

    @property
    def steps(self) -> list[int]:
        """Numbers of the steps on disk, the newest last."""
        return from_first(sorted(self._manager.all_steps()))

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Start to write a step; returns when the arrays are copied, so that they may be donated.

        A step that cannot be written, now or in the background, is reported and given up.
        """
        self._start(int(state.step), _items(state), meta)

    def save_weights(self, step: int, weights: dict[str, Params], meta: dict[str, Any]) -> None:
        """Write a step that holds weights only: `params`, `ema_params` or both.

        Raises:
          UserError: it cannot be written.
        """
        self._start(step, weights, meta)
        if problem := self.settle():
            raise UserError(f"the weights could not be written to {self.folder}: {problem}")

    def _start(self, step: int, items: dict[str, Any], meta: dict[str, Any]) -> None:
        self.settle()
        meta = json.loads(json.dumps(meta)) | {"digests": {name: digest(x) for name, x in items.items()}}
        meta["digests"]["meta"] = meta_digest(meta)
        arrays = {name: ocp.args.PyTreeSave(x) for name, x in items.items()}
        self._saving, self._failure = step, ""
        with self._reported():
            self._manager.save(step, args=ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta)))

    def poll(self) -> None:
        """Report, without waiting, that the save under way has failed."""
        if self._saving is not None and not self._failure:
            with self._reported():
                self._manager.check_for_errors()

    def settle(self) -> str:
        """Wait for the save under way; why the newest attempt failed, "" if it did not."""
        if self._saving is None:
            return self._failure
        with self._reported():
            self._manager.wait_until_finished()
        if not everywhere(not self._failure):
            self._failure = self._failure or "another process could not write its part"
            with self._reported():
                self._manager.close()
            # A new manager removes the unfinished files, which may be what fills the disk.
            self._open()
        self._saving = None
        return self._failure

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Report the first error of the save under way, and go on."""
        try:
            yield
        except _NOT_OF_FILES:
            raise
        except Exception as error:
            if not self._failure:
                self._failure = _first_line(error)
                log.warning(f"warning: checkpoint {self._saving:,} could not be written: {self._failure}")

    def newest_healthy(self, read: Callable[[int, dict[str, Any]], T]) -> tuple[int, dict[str, Any], T]:
        """Step, meta and read(step, meta) of the newest step that can be read; damaged ones are reported.

        Raises:
          UserError: there is none, or `read` raised it.
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                meta = self.meta(step)
                return step, meta, read(step, meta)
            except DamagedError as error:
                log.warning(f"warning: passed over: {error}")
        if len(steps) == 1:
            raise UserError(f"the only checkpoint in {self.folder}, step {steps[0]:,}, cannot be read")
        raise UserError(f"none of the {len(steps)} checkpoints in {self.folder} can be read")

    def healthy(
        self, step: int | None, read: Callable[[int, dict[str, Any]], T]
    ) -> tuple[int, dict[str, Any], T]:
        """As `newest_healthy`, of that step alone where one is given.

        Raises:
          UserError: it is not there, it is damaged, or `read` raised it.
        """
        if step is None:
            return self.newest_healthy(read)
        if step not in self.steps:
            kept = ", ".join(f"{kept:,}" for kept in self.steps)
            raise UserError(f"step={step!r}: {self.folder.parent} holds the steps {kept}")
        meta = self.meta(step)
        return step, meta, read(step, meta)

    def meta(self, step: int) -> dict[str, Any]:
        """What a step says of itself.

        Raises:
          DamagedError: it cannot be read, it was altered, or it does not hold what a step says.
        """
        meta = self._read(step, "meta", ocp.JsonCheckpointHandler, ocp.args.JsonRestore())
        digests = meta.get("digests") if isinstance(meta, dict) else None
        if not isinstance(digests, dict) or meta_digest(meta) != digests.get("meta"):
            raise self._damaged(step, "meta", "it is not what was written, or written without digests")
        try:
            return checked_meta(meta)
        except UserError as error:
            raise self._damaged(step, "meta", str(error)) from error

    def restore(self, step: int, meta: dict[str, Any], shapes: TrainState) -> TrainState:
        """The state of a step, placed as the ShapeDtypeStructs of `shapes` say.

        Raises:
          DamagedError: an item of it cannot be read, or was altered.
          StructureError: it is the state of another network or optimizer.
        """
        readers = {"opt_state": self._restore_opt_state}
        items = {
            name: readers.get(name, self._restore)(step, meta, name, x) for name, x in _items(shapes).items()
        }
        ema = {track: items.pop(f"{track}_params") for track in shapes.ema}
        return TrainState(**items.pop("counters"), **items, ema=ema)

    def restore_weights(self, step: int, meta: dict[str, Any], weights: str, mesh: Mesh) -> Params:
        """The set "ema" or "params" alone, of the network that `meta` configures; one set stands for both.

        Raises:
          DamagedError: it cannot be read, or was altered.
        """
        item = WEIGHTS[weights]
        if item not in meta["digests"]:
            (item,) = (name for name in WEIGHTS.values() if name != item)
        config = ConfigDict(meta["config"])
        network = method_of(config), shape_of(config), compute_of(config)
        shapes = jax.eval_shape(lambda: init_params(*network, 0))
        return self._restore(step, meta, item, place_shapes(shapes, mesh))

    def _restore_opt_state(self, step: int, meta: dict[str, Any], item: str, shapes: Any) -> Any:
        try:
            return self._restore(step, meta, item, shapes)
        except StructureError:
            saved = without_clip(shapes)
            if self._difference(step, item, saved):
                raise
            return with_clip(self._restore(step, meta, item, saved))

    def _restore(self, step: int, meta: dict[str, Any], item: str, shapes: Any) -> Any:
        try:
            restored = self._read(step, item, ocp.StandardCheckpointHandler, ocp.args.StandardRestore(shapes))
        except DamagedError as error:
            if difference := self._difference(step, item, shapes):
                raise StructureError(
                    f"checkpoint {step:,} in {self.folder} is of another network or optimizer: {item}: "
                    f"{difference}; go on with the options and the version of maskdit_jax that made it, or "
                    "train in a new folder"
                ) from error
            raise
        if digest(restored) != meta["digests"].get(item):
            raise self._damaged(step, item, "its values are not those that were saved")
        return restored

    def _difference(self, step: int, item: str, shapes: Any) -> str:
        """The first array that a sound item on disk has otherwise than `shapes`; "" for none."""
        line = ""
        if jax.process_index() == 0:
            with contextlib.suppress(Exception):  # Orbax raises anything of a damaged one; `_read` said so
                _check_files(self.folder / str(step) / item)
                there = _shapes(ocp.StandardCheckpointHandler().metadata(self.folder / str(step) / item).tree)
                here = _shapes(shapes)
                name = next(name for name in {**here, **there} if here.get(name) != there.get(name))
                line = f"{name} is {there.get(name, 'missing')}, expected {here.get(name, 'none')}"
        return from_first(shown(line, 200))

    def _read(self, step: int, item: str, handler: type, args: Any) -> Any:
        """An item, in every process or in none; each reads alone, so that none waits for one that failed."""
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix=str(jax.process_index()),
        )
        problem, content = "", None
        try:
            _check_files(self.folder / str(step) / item)
            with ocp.Checkpointer(
                handler(multiprocessing_options=alone), multiprocessing_options=alone
            ) as reader:
                content = reader.restore(self.folder / str(step) / item, args=args)
        except _NOT_OF_FILES:
            raise
        except Exception as error:
            problem = _first_line(error)
        if not everywhere(not problem):
            raise self._damaged(step, item, problem or "another process cannot read it")
        return content

    def _damaged(self, step: int, item: str, problem: str) -> DamagedError:
        return DamagedError(f"checkpoint {step:,} in {self.folder} is damaged: {item}: {problem}")

    def set_aside_after(self, step: int) -> None:
        """Move the steps after `step`, which are damaged, out of the way of those that will be written."""
        later = [s for s in self.steps if s > step]
        if later and jax.process_index() == 0:
            for damaged in later:
                aside = self.folder.parent / DAMAGED_FOLDER
                aside.mkdir(exist_ok=True)
                same = len(list(aside.glob(f"{damaged}.*")))
                (self.folder / str(damaged)).rename(aside / f"{damaged}.{same}")
        if everywhere(bool(later)):
            self._manager.close()
            self._open()
            log.warning(
                f"warning: moved damaged checkpoints {later} to {self.folder.parent / DAMAGED_FOLDER}"
            )

    def close(self) -> None:
        """Wait until everything is on disk."""
        self.settle()
        self._manager.close()


def open_run(workdir: str | Path) -> Checkpoints:
    """Checkpoints of an existing run, to read.

    Raises:
      UserError: the folder holds no checkpoint.
    """
    checkpoints = Checkpoints(workdir) if (Path(workdir) / FOLDER).is_dir() else None
    if checkpoints is None or not checkpoints.steps:
        raise UserError(f"{workdir} is not the folder of a run: it has no checkpoint in {FOLDER}/")
    return checkpoints


def _check_files(item: Path) -> None:
    """Look before Orbax does: it would wait for ever at a pipe, and read JSON of any size.

    Folders named d hold the arrays' values.
    """
    for file in item.rglob("*"):
        if not file.is_file() and not file.is_dir():
            raise UserError(f"{file.name} is neither a file nor a folder")
        if file.parent.name != "d" and file.is_file() and file.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{file.name} has {file.stat().st_size:,} bytes")


def _items(state: TrainState) -> dict[str, Any]:
    """What of a state is saved on its own, and can be read on its own."""
    return {
        "params": state.params,
        **{f"{track}_params": params for track, params in state.ema.items()},
        "opt_state": state.opt_state,
        "counters": {name: getattr(state, name) for name in ("nonfinite_in_row", "nonfinite_total", "step")},
    }


def _shapes(tree: Any) -> dict[str, str]:
    """Type and shape of every array of a state's item, or of Orbax's notes of one, by name."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{x.dtype}{list(x.shape)}"
        for path, x in leaves
    }


def _first_line(error: BaseException) -> str:
    """Of the error that caused it, where there is one: Orbax's own then says no more than where."""
    return first_line(error.__cause__ or error)
