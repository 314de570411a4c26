"""What a person sees of a run: progress lines, curves and sample grids."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.data.images import contact_sheet, save_png, to_uint8
from maskdit_jax.log import duration, log
from maskdit_jax.sampling import Model
from maskdit_jax.training.sinks import Sinks, survive
from maskdit_jax.training.step import Metrics

# Steps whose metrics are still on their way: the device always has the next step to work on.
IN_FLIGHT = 2


class Reporter:
    """Collects metrics of steps without making the device wait, and writes means at intervals.

    sinks: get every number and picture; also(step, skipped): further numbers for them after `step` updates,
    of which so many were skipped.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        first_step: int,
        num_steps: int,
        batch_size: int,
        every_steps: int,
        sinks: Sinks | None = None,
        also: Callable[[int, int], dict[str, float]] = lambda step, skipped: {},
    ):
        self._workdir = workdir
        self._num_steps, self._batch_size, self._every = num_steps, batch_size, every_steps
        self._sinks, self._also = sinks or Sinks(), also
        self._waiting: collections.deque[tuple[list[str], jax.Array]] = collections.deque()
        self._interval: list[dict[str, float]] = []
        self._step = first_step
        # The first step includes compilation: both clocks start when it is done.
        self._first_timed_step: int | None = None
        self._started = self._interval_started = 0.0

    def add(self, metrics: Metrics) -> list[dict[str, float]]:
        """Take the metrics of the step just dispatched; return those of an earlier step, if any arrived."""
        values = _in_one_array(metrics)
        values.copy_to_host_async()
        self._waiting.append((list(metrics), values))
        return [self._arrive()] if len(self._waiting) > IN_FLIGHT else []

    def drain(self) -> list[dict[str, float]]:
        """Wait for all steps taken; their metrics."""
        return [self._arrive() for _ in range(len(self._waiting))]

    def _arrive(self) -> dict[str, float]:
        names, values = self._waiting.popleft()
        metrics = dict(zip(names, jax.device_get(values).tolist()))
        now = time.monotonic()
        self._step += 1
        if self._first_timed_step is None:
            self._started = self._interval_started = now
            self._first_timed_step = self._step
        self._interval.append(metrics)
        if self._step % self._every == 0 or self._step == self._num_steps:
            self._report(now)
        return metrics

    def _report(self, now: float) -> None:
        interval, self._interval = self._interval, []
        means = {}
        for name in _in_order(interval[-1]):
            # Skipped steps are counted, not averaged.
            values = [m[name] for m in interval if name in m and np.isfinite(m[name])]
            if values:
                means[name] = float(np.mean(values))
        timed_steps = self._step - max(self._step - len(interval), self._first_timed_step or 0)
        seconds = now - self._interval_started
        speed = timed_steps * self._batch_size / seconds if timed_steps and seconds else 0.0
        self._interval_started = now
        skipped = int(interval[-1]["nonfinite_total"])

        parts = [f"step {self._step:,}/{self._num_steps:,}"]
        parts += [f"{name} {mean:.4f}" for name, mean in means.items()]
        parts += [f"{speed:,.0f} images/s"] if speed else []
        parts += [f"{duration(self._time_left(now))} left"] if speed else []
        parts += [f"{skipped} non-finite steps skipped"] if skipped else []
        log.info(" · ".join(parts))
        scalars = means | {"nonfinite_total": skipped} | self._also(self._step, skipped)
        scalars |= {"images_per_second": speed} if speed else {}
        self._sinks.scalars(self._step, scalars)

    def _time_left(self, now: float) -> float:
        done = self._step - (self._first_timed_step or 0)
        return (self._num_steps - self._step) * (now - self._started) / max(done, 1)

    def grid(self, step: int, grid: np.ndarray) -> None:
        """Write a sample grid [H, W, 1 or 3] uint8 as a PNG and to the sinks."""
        path = self._workdir / "previews" / f"step_{step:08d}.png"
        with survive(path):
            path.parent.mkdir(exist_ok=True)
            save_png(path, grid)
            log.info(f"preview: {path}")
        self._sinks.image(step, "samples", grid)

    def measured(self, step: int, name: str, value: float, is_best: bool = False) -> None:
        """Write one number about samples of a step, and to the sinks under that name."""
        log.info(f"step {step:,}: {name} {value:.4f}" + ", the best so far" * is_best)
        self._sinks.scalars(step, {name: value})

    @contextlib.contextmanager
    def off_the_clock(self) -> Iterator[None]:
        """Leave what runs inside, with no step in flight, out of the speed."""
        entered = time.monotonic()
        yield
        if self._first_timed_step is not None:
            spent = time.monotonic() - entered
            self._started += spent
            self._interval_started += spent

    def close(self) -> None:
        """Write out what is buffered."""
        self._sinks.close()


@jax.jit
def _in_one_array(metrics: Metrics) -> jax.Array:
    """Float32 [their number]: the host asks for one array a step instead of for each."""
    return jnp.stack([value.astype(jnp.float32) for value in metrics.values()])


def _in_order(metrics: dict[str, float]) -> list[str]:
    """Names of the metrics that are averaged: the loss, what the method returns beside it, the rest."""
    terms = (n for n in metrics if n not in ("loss", "grad_norm") and not n.startswith("nonfinite_"))
    return ["loss", *terms, "grad_norm"]


def sample_grid(model: Model) -> np.ndarray:
    """Grid [H, W, 1 or 3] uint8 of samples, a row for each class; of latents three channels."""
    report, num_classes = model.config.report, model.shape.num_classes
    columns = report.preview_columns
    rows = min(report.preview_rows, num_classes or report.preview_rows)
    labels = np.repeat(np.arange(rows), columns) if num_classes else None
    batch_size = -(-rows * columns // model.mesh.size)
    images = model.sample(np.arange(rows * columns), labels, batch_size=batch_size)
    return contact_sheet(to_uint8(images[..., : 3 if images.shape[-1] >= 3 else 1]), columns)
