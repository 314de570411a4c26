"""One run in several processes, on one host or many: how they start, agree, and end together."""

import argparse
import contextlib
import ctypes
import json
import logging
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from maskdit_jax.distributed import peers
from maskdit_jax.distributed.handshake import bind_address, listen
from maskdit_jax.distributed.peers import PEER_LOST, Peers
from maskdit_jax.errors import UserError, first_line, one_line_errors
from maskdit_jax.log import log
from maskdit_jax.program_cache import keep_programs

PREEMPTED = 75  # exit code: stopped, saved, run the same command again (EX_TEMPFAIL of sysexits.h)
GPU_REMEDY = "pip install '.[cuda12]' in the repository, and leave JAX_PLATFORMS unset"
# Variables with which a launcher says how many processes it has started; JAX reads the rest from them.
_LAUNCHERS = {"SLURM_STEP_NUM_TASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a command that may run as several processes; Slurm and Open MPI need none of them."""
    group = parser.add_argument_group("several processes (Slurm's srun and Open MPI's mpirun are detected)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--num_processes", type=int, help="of the run")
    group.add_argument("--process_id", type=int, help="of this process: 0 … num_processes - 1")
    group.add_argument("--connect_timeout", type=int, default=300, help="seconds to wait for all of them")
    group.add_argument(
        "--peer_timeout", type=float, default=60, help="seconds of silence after which a process is lost"
    )
    group.add_argument(
        "--stall_timeout", type=float, default=900, help="seconds a process may stay behind the others' step"
    )


def shared_flags(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags of a command that must be the same in all processes: all but those of `add_flags`."""
    own = argparse.ArgumentParser()
    add_flags(own)
    names = vars(flags).keys() - vars(own.parse_args([])).keys()
    return {f"--{name}": getattr(flags, name) for name in sorted(names)}


class Refused(UserError):
    """Raised in all processes of a run at the same place: each says so itself, and nobody was lost."""


@contextlib.contextmanager
def joined(flags: argparse.Namespace) -> Iterator[Peers]:
    """Run a command's body as one process of the run that the flags or the launcher's variables describe.

    Errors end it as `one_line_errors` says, and the other processes with it (exit code 76, of `Refused`
    2). Only process 0 reports.
    """
    keep_programs()
    with one_line_errors():
        several = _initialize(flags)
        if not several:
            check_devices()
            yield Peers({}, flags.peer_timeout, flags.stall_timeout)
            return
    code: str | int | None = 0
    others = Peers({}, flags.peer_timeout, flags.stall_timeout)
    try:
        with one_line_errors():
            check_devices()
            others = _connect(flags)
            try:
                yield others
            except Refused:
                others.finished()
                raise
            except (Exception, KeyboardInterrupt) as error:
                if isinstance(error, jax.errors.JaxRuntimeError):
                    others.wait_for_verdict()
                others.failed(str(error) or type(error).__name__)
                raise
    except SystemExit as stop:
        code = stop.code
    except Exception:
        traceback.print_exc()
        code = 1
    if code not in (0, PREEMPTED):
        # At once: JAX would wait for the others' goodbye, which they do not say.
        peers.end_process(code if isinstance(code, int) else 1)
    others.finished()
    jax.distributed.shutdown()
    sys.exit(code)


def check_devices() -> None:
    """Start JAX's devices.

    Raises:
      UserError: there are none of the kind that is asked for, or JAX lacks what drives them.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where a plugin is not installed
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        why = "its plugin is not installed" if isinstance(error, AssertionError) else first_line(error)
        raise UserError(f"JAX finds no devices with {asked}: {why}; for NVIDIA GPUs {GPU_REMEDY}") from error


def _initialize(flags: argparse.Namespace) -> bool:
    """Bring the processes of the run together in JAX; False when there is one only."""
    launcher = _launcher(flags)
    if launcher is None:
        return False
    for name in ("connect_timeout", "peer_timeout", "stall_timeout"):
        if not 0 < getattr(flags, name) < math.inf:
            raise UserError(f"--{name}={getattr(flags, name)} must be a number of seconds greater than 0")
    who = f"process {flags.process_id} of {flags.num_processes}" if launcher == "flags" else "this process"
    where = flags.coordinator or f"the address that {launcher} gives"
    _on_abort(
        f"error: not all processes of the run came together at {where} within {flags.connect_timeout} s "
        f"(this is {who}); check that each was started, with the same coordinator and number of processes, "
        "and that no firewall lies between them"
    )
    jax.distributed.initialize(
        flags.coordinator,
        flags.num_processes,
        flags.process_id,
        initialization_timeout=flags.connect_timeout,
        # Ours comes first, and names the process.
        heartbeat_timeout_seconds=int(2 * flags.peer_timeout + flags.stall_timeout),
        # Left to JAX, the port is open on all addresses, also when all processes are on this host.
        coordinator_bind_address=flags.coordinator if bind_address(_host(flags)) else None,
    )
    _on_abort("error: JAX's distributed runtime ended this process; another one of the run has probably died")
    return True


def _connect(flags: argparse.Namespace) -> Peers:
    if jax.process_index() > 0:
        log.setLevel(logging.WARNING)
    try:
        return peers.connect(from_first, _host(flags), flags.peer_timeout, flags.stall_timeout)
    except OSError as error:
        raise UserError(
            f"the processes do not all reach process 0: {error}; open all ports in the firewall"
        ) from error


def _host(flags: argparse.Namespace) -> str | None:
    """The host of process 0 as all name it; None where only the launcher knows, or JAX's variable rules."""
    if flags.coordinator is None or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return None
    return flags.coordinator.rpartition(":")[0].strip("[]")


def _launcher(flags: argparse.Namespace) -> str | None:
    """Who says which process this is: the flags, a launcher's variables, or nobody; checked."""
    given = {name: getattr(flags, name) for name in ("coordinator", "num_processes", "process_id")}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == 3:
        found = [name for name in _LAUNCHERS if int(os.environ.get(name, 1)) > 1]
        return _LAUNCHERS[found[0]] if found else None
    if missing:
        raise UserError(f"{', '.join(missing)} must be given too: a process needs all three, or none")
    if not 0 <= flags.process_id < flags.num_processes:
        raise UserError(f"--process_id={flags.process_id}: expected 0 … {flags.num_processes - 1}")
    if flags.num_processes == 1:
        return None
    host, _, port = flags.coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={flags.coordinator}: expected HOST:PORT such as node0:12345")
    if flags.process_id == 0:
        _check_free(bind_address(_host(flags)), int(port))
    else:
        _wait_for(host.strip("[]"), int(port), flags.connect_timeout)
    return "flags"


def _check_free(address: str, port: int) -> None:
    try:
        listen(address, port).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"--coordinator: port {port} of this host: {reason}; choose another") from error


def _wait_for(host: str, port: int, timeout_s: float) -> None:
    """Wait until somebody answers at host:port: JAX's own wait ends in an abort without a word of why."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            wait_s = max(deadline - time.monotonic(), 0.1)
            return socket.create_connection((host, port), timeout=wait_s).close()
        except OSError as error:
            if time.monotonic() + 0.5 > deadline:
                raise UserError(
                    f"nobody answers at --coordinator={host}:{port} after {timeout_s:g} s ({error}): start "
                    "process 0 there, give every process its address, and open the port in the firewall"
                ) from error
            time.sleep(0.5)


_handlers: list[Any] = []  # ctypes does not keep alive what C still calls


def _on_abort(line: str) -> None:
    """Before JAX's runtime aborts this process, let the watch name the lost one, or print `line`.

    The runtime aborts in a thread of its own within a millisecond of losing process 0, and asks nobody.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(_signal):
        time.sleep(3)
        peers.end_process(PEER_LOST, line)

    _handlers.append(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def from_first(value: Any) -> Any:
    """What process 0 calls this with, in every process: anything that JSON can hold."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = np.resize(data, size)  # of the others any bytes of that length
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))))


def from_all(value: Any) -> list[Any]:
    """What each process calls this with, in their order, in every process: anything that JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = np.pad(data, (0, int(max(sizes)) - len(data)))
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def everywhere(holds: bool) -> bool:
    """Whether `holds` is true in every process."""
    return holds if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(holds)))


class Preemption:
    """Within the block SIGTERM, as Slurm and clouds send it before they take the machine, only asks to stop.

    So does the first Ctrl-C in a run of one process; the second ends it at once. asked(step): whether to
    stop, the same answer in every process at the same step, whichever of them got the signal; by: what asked.
    """

    by = "SIGTERM"

    def __enter__(self) -> "Preemption":
        self._signalled = False
        self._several = jax.process_count() > 1  # then JAX has its own handler, which tells the others
        if not self._several:
            numbers = (signal.SIGTERM, signal.SIGINT)
            self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        previous = {signal.SIGTERM: signal.SIG_DFL} if self._several else self._previous
        for number, handler in previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._signalled:
                raise KeyboardInterrupt
            self.by = "Ctrl-C"
            log.info("stopping after this step, which is saved; Ctrl-C again ends at once")
        self._signalled = True

    def asked(self, step: int) -> bool:
        """Whether this is the step to stop at."""
        return multihost_utils.reached_preemption_sync_point(step) if self._several else self._signalled
