"""The training loop: data → step → report → preview → measurement → checkpoint. No mathematics."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from clu.parameter_overview import get_parameter_overview

from maskdit_jax.config import ConfigDict, described, method_of, shape_of
from maskdit_jax.data.pipeline import batches, to_devices
from maskdit_jax.data.sources import Batch, Source, open_source
from maskdit_jax.data.vae import open_codec
from maskdit_jax.distributed.hosts import PREEMPTED, Preemption
from maskdit_jax.distributed.mesh import batch_sharding, check_fits, describe_placement, whole_sharding
from maskdit_jax.distributed.peers import Peers
from maskdit_jax.errors import UserError
from maskdit_jax.evaluation.monitor import Monitor
from maskdit_jax.log import counted, log
from maskdit_jax.methods.method import Shape
from maskdit_jax.program_cache import kept_programs
from maskdit_jax.sampling import Model
from maskdit_jax.training.best import Best
from maskdit_jax.training.build import Training, build
from maskdit_jax.training.changes import check_changes
from maskdit_jax.training.checkpoint import Checkpoints
from maskdit_jax.training.init_from import check_same_network, start_from
from maskdit_jax.training.report import Reporter, sample_grid
from maskdit_jax.training.run_folder import RunFolder
from maskdit_jax.training.sinks import METRICS, MetricsFile, Sinks, open_boards
from maskdit_jax.training.state import EMA, TrainState


class Position(NamedTuple):
    """How far a run has come: items consumed, and seconds trained by earlier commands."""

    items: int = 0
    seconds: float = 0.0


def train(
    config: ConfigDict, workdir: Path, source: Source, peers: Peers, *, allow_changes: bool = False
) -> None:
    """Run `config`, resolved, in the folder `workdir` up to its last step; continue if it has begun.

    `source` is what `open_configured_source` gives; allow_changes: go on also with options that make it
    another run.

    Raises:
      UserError: the folder, the run to start from, the options that have changed or the memory do not fit,
        too many steps in a row were not finite, or the last step could not be saved.
      SystemExit: with the code PREEMPTED, after SIGTERM or Ctrl-C, when the step is saved.
    """
    with RunFolder(workdir) as folder:
        _train(config, workdir, source, peers, folder, allow_changes)


def _train(
    config: ConfigDict, workdir: Path, source: Source, peers: Peers, folder: RunFolder, allow_changes: bool
) -> None:
    training, steps = build(config), config.training.num_steps
    check_fits(training.state_shapes)
    # Opened now, so that a wrong folder stops the run before it begins.
    data = config.data
    codec = open_codec(data.space, data.latent_scale, data.channels, config.vae, config.compute.precision)
    checkpoints = Checkpoints(workdir, config.checkpoint.keep, config.checkpoint.keep_every_steps)
    if max(checkpoints.steps, default=0) < steps:
        kept = kept_programs()
        log.info("compiling, which takes a while" + f" the first time; kept in {kept}" * bool(kept))
    state, begun = _begin(config, training, checkpoints, allow_changes)
    step = saved_step = int(state.step)
    if step >= steps:
        log.info(f"already finished: step {step:,} of {steps:,}")
        return checkpoints.close()

    log.info(_describe(config, training, len(source)))
    monitor = Monitor(config, codec) if config.evaluation.every_steps else None
    best = Best(workdir, monitor.name, monitor.reference) if monitor and config.evaluation.keep_best else None
    started = time.monotonic()

    def trained():
        return begun.seconds + time.monotonic() - started

    reporter = _reporter(config, workdir, training, step, begun.items, trained)
    folder.begin(config, step)
    device_batches = to_devices(host_batches(source, config, begun.items), batch_sharding(training.mesh))
    items = begun.items

    def meta():
        return {
            "config": config.to_dict(),
            "class_names": list(source.class_names) if config.data.num_classes else [],
            "items_consumed": items,
            "seconds": trained(),
        }

    def save():
        nonlocal saved_step
        saved_step = step
        checkpoints.save(state, meta())

    def ema_model(codec):
        return Model(
            config, jax.device_put(state.ema[EMA], whole_sharding(training.mesh)), training.mesh, codec
        )

    with contextlib.ExitStack() as stack:
        stack.callback(reporter.close)
        stack.callback(checkpoints.close)
        if best:
            stack.callback(best.close)
        preemption = stack.enter_context(Preemption())
        while step < steps:
            peers.at(step)
            if preemption.asked(step):
                reporter.drain()
                if step > saved_step and not int(state.nonfinite_in_row):
                    save()
                _stop(checkpoints, step, saved_step, preemption.by)
            state, metrics = training.step(state, next(device_batches), training.num_keep(step))
            step, items = step + 1, items + config.training.batch_size
            arrived = reporter.add(metrics)
            checkpoints.poll()
            checkpoint_due = step % config.checkpoint.every_steps == 0
            preview_due = config.report.preview_steps and step % config.report.preview_steps == 0
            measurement_due = monitor and step % config.evaluation.every_steps == 0
            if checkpoint_due or preview_due or measurement_due or step == steps:
                arrived += reporter.drain()
            _stop_if_diverged(arrived, config.training.max_nonfinite_steps, checkpoints)
            with reporter.off_the_clock():
                # Before the checkpoint: a run killed between the two then makes both again.
                if preview_due:
                    reporter.grid(step, sample_grid(ema_model(codec)))
                if monitor and measurement_due:
                    score = monitor.score(ema_model(monitor.codec))
                    checkpoints.settle()  # of the processes' saves one at a time
                    is_best = best is not None and best.offer(score, state, meta())
                    reporter.measured(step, monitor.name, score, is_best)
                # The update before skipped ones may have ruined the weights: older checkpoints stay.
                if step == steps or (checkpoint_due and not int(state.nonfinite_in_row)):
                    save()
        if problem := checkpoints.settle():
            raise UserError(
                f"the last step, {step:,}, could not be saved: {problem}; the same command goes on from step "
                f"{max(checkpoints.steps, default=0):,}"
            )


def _reporter(
    config: ConfigDict,
    workdir: Path,
    training: Training,
    first_step: int,
    first_item: int,
    trained: Callable[[], float],
) -> Reporter:
    """A reporter of the run from that step and item; trained(): seconds so far, also of earlier commands."""
    sinks, batch_size = Sinks(), config.training.batch_size
    if jax.process_index() == 0:
        # The boards first: what they lack is said before anything is written.
        boards = open_boards(workdir, config)
        sinks = Sinks([*boards, MetricsFile(workdir / METRICS, first_step)])
        parameters = get_parameter_overview(training.state_shapes.params, include_stats=False)
        for name, lines in (("configuration", described(config)), ("parameters", parameters.splitlines())):
            sinks.text(first_step, name, "\n".join(f"    {line}" for line in lines))

    def also(step: int, skipped: int) -> dict[str, float]:
        return {
            "kimg": (first_item + (step - first_step) * batch_size) / 1000,
            "learning_rate": float(training.learning_rate(step - 1 - skipped)),
            "mask_ratio": 1 - training.num_keep(step - 1) / training.num_tokens,
            "seconds": trained(),
        }

    return Reporter(
        workdir,
        first_step=first_step,
        num_steps=config.training.num_steps,
        batch_size=batch_size,
        every_steps=config.report.every_steps,
        sinks=sinks,
        also=also,
    )


def _begin(
    config: ConfigDict, training: Training, checkpoints: Checkpoints, allow_changes: bool
) -> tuple[TrainState, Position]:
    """The state to go on from: of the newest checkpoint, of another run's weights, or fresh."""

    def restore(step: int, meta: dict[str, Any]) -> TrainState:
        folder = checkpoints.folder.parent
        for note, what in (("imported_from", "imported weights"), ("best", "the best weights of one")):
            if note in meta:
                raise UserError(
                    f"{folder} holds {what}, not a run to continue: train in a new folder with "
                    f"--config.init_from={folder}"
                )
        saved = ConfigDict(meta["config"])
        check_same_network(saved, config, str(checkpoints.folder), *Shape._fields)
        check_changes(saved, config, str(folder), allow=allow_changes)
        return checkpoints.restore(step, meta, training.state_shapes)

    if not checkpoints.steps:
        fresh = start_from(config, training) if config.init_from else training.start(None)
        return fresh, Position()
    step, meta, state = checkpoints.newest_healthy(restore)
    checkpoints.set_aside_after(step)
    log.info(
        f"resumed at step {step:,} from {checkpoints.folder}; the data go on at item "
        f"{meta['items_consumed']:,} of the run's order, for "
        f"{counted(jax.process_count(), 'process', 'processes')}"
    )
    return state, Position(meta["items_consumed"], meta["seconds"])


def _stop(checkpoints: Checkpoints, step: int, saved_step: int, by: str) -> NoReturn:
    problem = checkpoints.settle()
    saved = f"not saved: {problem}" if problem else f"step {saved_step:,} is saved"
    log.warning(f"stopped by {by} at step {step:,}: {saved}; the same command goes on")
    sys.exit(PREEMPTED)


def open_configured_source(config: ConfigDict) -> Source:
    """The source that a resolved configuration names, compared with its model."""
    source = open_source(
        config.data.source,
        shape_of(config),
        space=config.data.space,
        seed=config.seed,
        flip=config.data.flip,
        max_zoom=config.data.max_zoom,
        max_unreadable=config.data.max_unreadable,
    )
    warn_of_scale(source, config)
    return source


def host_batches(source: Source, config: ConfigDict, start_item: int) -> Iterator[Batch]:
    """This process's parts of the run's batches, from a position in the run's order of items."""
    return batches(
        source,
        batch_size=config.training.batch_size,
        seed=config.seed,
        start_item=start_item,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
    )


def warn_of_scale(source: Source, config: ConfigDict) -> None:
    """Say so when the latents are far from the standard deviation that the method assumes."""
    assumed, scale = method_of(config).data_std(), config.data.latent_scale
    if source.rms is not None and assumed is not None and not 0.5 <= source.rms * scale / assumed <= 2:
        log.warning(
            f"warning: the latents of {config.data.source} have an rms of {source.rms * scale:.3g}, but "
            f"method.sigma_data={assumed:g}: is data.latent_scale={scale:g} right?"
        )


def _describe(config: ConfigDict, training: Training, num_items: int) -> str:
    count = sum(x.size for x in jax.tree.leaves(training.state_shapes.params))
    levels = ", ".join(str(k) for k in training.keep_levels)
    return (
        f"{count:,} parameters · {num_items:,} items of {config.data.source} · batch "
        f"{config.training.batch_size} on {counted(training.mesh.size, f'{jax.default_backend()} device')}, "
        f"data {config.mesh.data} × fsdp {config.mesh.fsdp} · visible patches {levels} of "
        f"{training.num_tokens}: {counted(len(training.keep_levels), 'compiled program')}\n"
        + describe_placement(training.state_shapes, training.mesh)
    )


def _stop_if_diverged(arrived: list[dict[str, float]], limit: int, checkpoints: Checkpoints) -> None:
    worst = max((m["nonfinite_in_row"] for m in arrived), default=0)
    if worst >= limit:
        newest = max(checkpoints.steps, default=None)
        raise UserError(
            f"the loss or the gradient was not finite in {worst:.0f} steps in a row "
            f"(training.max_nonfinite_steps={limit}); "
            + ("there is no checkpoint yet" if newest is None else f"checkpoint {newest} is intact")
            + "; run again with a lower optimizer.learning_rate, with optimizer.clip_norm=1 or with "
            "compute.precision=float32"
        )
