"""What a run will need, checked before it starts: packages, devices, processes, data, disk.

A line for each thing, with a remedy where it fails. With several processes each runs the same command, with
the flags that it will have in the run.
"""

import argparse
import contextlib
import itertools
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maskdit_jax.config import ConfigDict, resolve
from maskdit_jax.config_file import load
from maskdit_jax.distributed import mesh
from maskdit_jax.distributed.hosts import GPU_REMEDY, add_flags, everywhere, joined
from maskdit_jax.distributed.peers import Peers, end_process
from maskdit_jax.errors import Parser, UserError, first_line
from maskdit_jax.log import counted, log, log_to_stdout
from maskdit_jax.training.agreement import (
    agree,
    check_same_folder,
    data_identity,
    nearest,
    run_options,
    this_process,
)
from maskdit_jax.training.build import Training, build

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
OPTIONAL = {  # and what there is not without each
    "grain": "training, which reads its data with it",
    "tensorflow-datasets": "data.source=tfds:NAME",
    "tensorboard": "TensorBoard files",
    "ml-collections": "check of names and types inside configuration files",
    "torch": "PyTorch's .pt files",
}
NETWORK_REMEDY = (
    "open all ports between the hosts in the firewall; GPUs: name the network interface that connects the "
    "hosts, NCCL_SOCKET_IFNAME=…; CPUs (Gloo): the others must reach the address that a host's own name has"
)
LARGEST_ERROR = 1e-4  # of a product, relative to its largest number
BATCHES_READ = 4


def diagnose(flags: argparse.Namespace, overrides: list[str]) -> None:
    """Make every check of the run that the flags of `main` describe; exit code 1 if any process fails one.

    Where the processes do not come together, or have no devices, `joined` says why and ends the command.
    """
    with contextlib.ExitStack() as stack:
        with _deadline(2 * flags.connect_timeout + 15, "processes"):  # joined knows more: it is first
            peers = stack.enter_context(joined(flags))
        _Checks(flags, overrides, peers).make()


class _Checks:
    """Each check gives what it found, or "" where there is nothing to check, or raises what is wrong."""

    def __init__(self, flags: argparse.Namespace, overrides: list[str], peers: Peers):
        self._flags, self._overrides, self._peers = flags, overrides, peers
        # Until the configuration, then the data, are found right.
        self._config: ConfigDict | None = None
        self._training: Training | None = None
        self._data: dict[str, Any] = {}

    def make(self) -> None:
        """All checks, then the summary; a failed one stops those that need what it makes."""
        passed, wrong = set(), set()
        for name in CHECKS:
            try:
                if found := getattr(self, name)():
                    passed.add(name)
                    log.info(f"ok      {name}: {found}")
            except Exception as error:  # of whatever kind: its line is the diagnosis, and others follow
                wrong.add(name)
                of_whom = f" of process {jax.process_index()}" if jax.process_index() else ""
                log.error(f"FAILED  {name}{of_whom}: {_line(error)}")
                if name == "collectives" and jax.process_count() > 1:
                    _give_up("the rest", "not checked, because it needs collectives", self._peers)
        failed = [name for name in CHECKS if not everywhere(name not in wrong)]
        count = len(passed.union(failed))
        if failed:
            log.info(f"{len(failed)} of {counted(count, 'check')} failed: {', '.join(failed)}")
            self._peers.finished()  # the others end as this one does, and miss nobody
            sys.exit(1)
        log.info(f"all {count} checks passed")

    def packages(self) -> str:
        """The core is there and new enough; what else there is."""
        there = {str(d.name).lower().replace("_", "-"): d for d in reversed([*metadata.distributions()])}
        asked = (there["maskdit-jax"].requires or []) if "maskdit-jax" in there else []
        matches = [re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for line in asked]
        least = {match[1]: match[2] for match in matches if match}
        versions = {name: there[name].version for name in (*CORE, *OPTIONAL) if name in there}
        old = [name for name in CORE if _numbers(versions.get(name, "")) < _numbers(least.get(name, ""))]
        if old:
            wrong = [f"{name} is {versions.get(name)}, expected {least[name]} or newer" for name in old]
            raise UserError(f"{'; '.join(wrong)}; pip install --upgrade -e . in the repository")
        lost = [f"; {name} not installed: no {OPTIONAL[name]}" for name in OPTIONAL if name not in there]
        return ", ".join(f"{name} {version}" for name, version in versions.items()) + "".join(lost)

    def processes(self) -> str:
        """How many there are: `joined` has connected them."""
        return f"{jax.process_count()}, all here"

    def devices(self) -> str:
        """Kind, number and memory of the devices of all processes."""
        backend, limits = jax.default_backend(), [stats["bytes_limit"] for stats in _memory()]
        if backend == "cpu" and (shutil.which("nvidia-smi") or os.path.exists("/dev/nvidia0")):
            log.warning(f"warning devices: there is an NVIDIA GPU, but JAX uses the CPU; {GPU_REMEDY}")
        memory = f"{min(limits) / 1e9:,.1f} GB each for JAX" if limits else "unknown"
        kinds = Counter(device.device_kind for device in jax.devices())
        names = ", ".join(f"{count} × {kind}" for kind, count in kinds.items())
        counts = list(Counter(device.process_index for device in jax.devices()).values())
        return f"{names}; backend {backend}; by process {counts}; memory {memory}"

    def arithmetic(self) -> str:
        """A float32 product on each device of this process is numpy's; one in bfloat16 is finite."""
        x, y = np.random.default_rng(0).standard_normal((2, 256, 256), np.float32)
        expected, errors = x.astype(np.float64) @ y, []
        for device in jax.local_devices():
            here = jax.device_put((x, y), device)
            half = jnp.matmul(*(matrix.astype(jnp.bfloat16) for matrix in here))
            product = np.asarray(jnp.matmul(*here, precision="highest"))
            errors.append(float(np.abs(product - expected).max() / np.abs(expected).max()))
            if not (errors[-1] <= LARGEST_ERROR and bool(jnp.isfinite(half).all())):
                error = f"{device} is {errors[-1]:.1e} off in float32, or not finite in bfloat16"
                raise UserError(f"{error}; reinstall jaxlib, or hide the device (CUDA_VISIBLE_DEVICES)")
        return f"float32 within {max(errors):.1e} on {counted(len(errors), 'device')}, bfloat16 finite"

    def collectives(self) -> str:
        """A sum over all devices of all processes is right, and ends in time."""
        count, seconds = jax.device_count(), []
        devices = mesh.make_mesh(count, 1)
        add = jax.jit(jnp.sum, out_shardings=mesh.whole_sharding(devices))
        with _deadline(self._flags.connect_timeout, "collectives", self._peers):
            numbers = mesh.to_mesh(np.arange(1, count + 1, dtype=np.float32), mesh.batch_sharding(devices))
            for _ in range(2):
                started = time.perf_counter()
                total = float(mesh.to_host(add(numbers)))
                seconds.append(time.perf_counter() - started)
        if total != count * (count + 1) / 2:
            raise UserError(f"a sum is {total:g}, expected {count * (count + 1) / 2:g}; reinstall jaxlib")
        first, second = (1000 * s for s in seconds)
        return f"a sum over {counted(count, 'device')} in {second:.1f} ms, the first in {first:.1f} ms"

    def configuration(self) -> str:
        """It is consistent; how its state lies on these devices, and what they have free."""
        if not self._flags.config:
            return ""
        config = resolve(load(self._flags.config, self._overrides), device_count=jax.device_count())
        training = build(config)
        self._config, self._training = config, training
        free = [stats["bytes_limit"] - stats["bytes_in_use"] for stats in _memory()]
        placement = mesh.describe_placement(training.state_shapes, training.mesh)
        found = f"mesh of data {config.mesh.data} × fsdp {config.mesh.fsdp}; {placement}"
        return found + (f"; {min(free) / 1e9:,.1f} GB of each device are free" if free else "")

    def data(self) -> str:
        """The source opens and gives batches; how fast."""
        if self._config is None:
            return ""
        # Imported here because it needs grain, without which the other checks can be made.
        from maskdit_jax.training.loop import host_batches, open_configured_source

        source, started = open_configured_source(self._config), time.perf_counter()
        self._data = data_identity(self._config, source)
        *_, part = itertools.islice(host_batches(source, self._config, 0), BATCHES_READ)
        speed = BATCHES_READ * len(part["labels"]) / (time.perf_counter() - started)
        shapes = ", ".join(f"{name} {list(x.shape)} {x.dtype}" for name, x in part.items())
        return f"{len(source):,} items; {shapes} in each process; {speed:,.0f} items/s in the first batches"

    def folder(self) -> str:
        """It, or the nearest one above it, can be written to and has room for the checkpoints."""
        if not self._flags.workdir:
            return ""
        there = nearest(self._flags.workdir)
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            raise UserError(f"cannot write to {there}: {error.strerror}; choose another --workdir") from error
        free = shutil.disk_usage(there).free
        room = f"{there} can be written to, {free / 1e9:,.1f} GB are free"
        if self._training and self._config:
            size, _ = mesh.bytes_of(self._training.state_shapes)
            saved = sum(path.name.isdigit() for path in self._flags.workdir.glob("checkpoints/*"))
            room += f"; {room_for_checkpoints(free, size, self._config.checkpoint.keep, saved)}"
        return room

    def agreement(self) -> str:
        """All processes have the same options, software and data, and see the same folder."""
        if jax.process_count() == 1:
            return ""
        config, workdir = self._config, self._flags.workdir
        folder = {"--workdir": os.path.realpath(workdir)} if workdir else {}
        agree({"the command": "doctor"} | this_process() | folder | {"--config": bool(self._flags.config)})
        same = ["software"]
        # What one process has not found, it has reported; the others' cannot be compared with it.
        if everywhere(config is not None) and config:
            agree(run_options(config, workdir))
            same.append("options")
        if everywhere(bool(self._data)):
            agree(self._data)
            same.append("data")
        found = f"the same {' and '.join(same)} in all processes"
        return f"{found}, which see {check_same_folder('--workdir', workdir)}" if workdir else found


CHECKS = "packages processes devices arithmetic collectives configuration data folder agreement".split()


def room_for_checkpoints(free: int, size: int, keep: int, saved: int) -> str:
    """What `keep` checkpoints of `size` bytes, and one being written, take beside the `saved` ones."""
    more = max(keep + 1 - saved, 1)
    needed = f"{counted(more, 'checkpoint')} of {size / 1e9:,.3f} GB"
    if more * size > free:
        remedy = f"lower checkpoint.keep={keep}, make room, or choose another --workdir"
        raise UserError(f"{needed} will not fit in the {free / 1e9:,.3f} GB that are free; {remedy}")
    return f"{needed} will fit"


@contextlib.contextmanager
def _deadline(seconds: float, name: str, peers: Peers | None = None) -> Iterator[None]:
    """End this process, from another thread, unless the block ends in time: it may wait in JAX for ever."""
    problem = f"no answer from the devices or the other processes in {seconds:g} s; {NETWORK_REMEDY}"
    timer = threading.Timer(seconds, _give_up, [name, problem, peers])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(name: str, problem: str, peers: Peers | None = None) -> None:
    log.error(f"FAILED  {name}: {problem}")
    if peers:
        peers.finished()
    end_process(1)


def _line(error: Exception) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return kind + first_line(error)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


def _memory() -> list[dict[str, int]]:
    """Statistics of the devices of this process that keep any."""
    all_stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return [stats for stats in all_stats if "bytes_limit" in stats]


def main(arguments: list[str] | None = None) -> None:
    """Parse flags, make the checks."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--config", help="file, or a recipe such as digits; default: no configuration is checked"
    )
    parser.add_argument("--workdir", type=Path, help="folder of the run; default: no folder is checked")
    add_flags(parser)
    parser.set_defaults(connect_timeout=60)
    parser.epilog = "--config.section.key=value overrides an option of the configuration."
    flags, overrides = parser.parse_known_args(arguments)
    if overrides and not flags.config:
        parser.error(f"unknown flag {overrides[0]}")
    log_to_stdout()
    diagnose(flags, overrides)
