"""The processes of a run watch each other: when one dies, hangs or fails, the others end and say which.

Process 0 is connected with every other one, and passes on what it learns. JAX notices a lost process too,
but late or with an abort that names nobody.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax

from maskdit_jax.distributed.handshake import Connected, meet
from maskdit_jax.errors import first_line, printable

PEER_LOST = 76  # exit code of a process that ends because another one did
_TICK_S = 1.0
# Of one message; the longest says why a process ends, in at most 1,000 characters of six bytes each.
_MESSAGE_BYTES = 2**14
_REASON_LENGTH = 1000


class Peers:
    """The other processes of this run; alone when there are none.

    Every second a process tells that it lives, and at which step it is. It is lost when its
    connection closes unannounced, when it sends no heartbeat for `peer_timeout_s`, or when for
    `stall_timeout_s` it stays behind the others, who wait for it.
    """

    def __init__(self, connections: dict[int, "_Connection"], peer_timeout_s: float, stall_timeout_s: float):
        self._connections, self._timeout_s, self._stall_s = connections, peer_timeout_s, stall_timeout_s
        self._step, self._finished = 0, False
        self._lock = threading.Lock()
        if connections:
            threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def at(self, step: int) -> None:
        """This process has reached `step`."""
        self._step = step

    def finished(self) -> None:
        """Say goodbye: from now on this process may end, and no other is missed."""
        self._leave({"finished": True})

    def failed(self, message: str) -> None:
        """Tell the others why this process ends; they end too."""
        message = printable(message)[:_REASON_LENGTH]
        self._leave({"lost": f"process {jax.process_index()} ({_name_of_this_process()}) stopped: {message}"})

    def wait_for_verdict(self) -> None:
        """After an error that a lost process may have caused: let the watch say so and end this process."""
        if self._connections:
            time.sleep(3 * _TICK_S)

    def _leave(self, message: dict[str, Any]) -> None:
        with self._lock:
            self._finished = True
            for connection in self._connections.values():
                connection.send(message)

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for process, connection in self._connections.items():
            selector.register(connection.socket, selectors.EVENT_READ, process)
        ticked = time.monotonic()
        while True:
            for key, _ in selector.select(_TICK_S):
                connection = self._connections[key.data]
                try:
                    open_ = connection.receive()
                except ValueError as error:
                    self._end(
                        f"process {key.data} ({connection.name}) sent a damaged message: {first_line(error)}"
                    )
                    return
                if connection.lost:
                    self._end(connection.lost)
                if not open_:
                    selector.unregister(connection.socket)
                    if not connection.finished:
                        self._end(f"process {key.data} ({connection.name}) is gone: its connection closed")
            if time.monotonic() - ticked >= _TICK_S:
                ticked = time.monotonic()
                with self._lock:
                    if self._finished:
                        return
                    for connection in self._connections.values():
                        connection.send({"step": self._step})
                self._check_silence(ticked)
                self._check_stall(ticked)

    def _check_silence(self, now: float) -> None:
        for process, connection in self._connections.items():
            if not connection.finished and now - connection.heard > self._timeout_s:
                self._end(
                    f"process {process} ({connection.name}) hangs: no heartbeat for {self._timeout_s:g} s"
                )

    def _check_stall(self, now: float) -> None:
        for process, connection in self._connections.items():
            behind = not connection.finished and connection.step < self._step
            if behind and now - connection.moved > self._stall_s:
                here = f"process {jax.process_index()} waits at step {self._step:,}"
                self._end(
                    f"process {process} ({connection.name}) hangs: it has been at step {connection.step:,} "
                    f"for {self._stall_s:g} s, while {here}"
                )

    def _end(self, reason: str) -> None:
        """End this process, from the watching thread: the main thread may wait in a collective for ever."""
        with self._lock:
            if self._finished:
                return
            for connection in self._connections.values():
                connection.send({"lost": reason})
        end_process(PEER_LOST, f"error: {reason}; the same command goes on from the newest checkpoint")


class _Connection:
    """A socket to another process, and what was heard through it."""

    def __init__(self, connected: socket.socket, name: str):
        self.socket, self.name = connected, name
        self.heard = self.moved = time.monotonic()
        self.step, self.finished, self.lost = 0, False, ""
        self._buffer = b""
        connected.settimeout(_TICK_S)

    def send(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # that it is gone shows in receiving
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> bool:
        """Take in what has come; False when the other side has closed.

        Raises:
          ValueError: it is not what `send` sends.
        """
        try:
            data = self.socket.recv(_MESSAGE_BYTES)
        except TimeoutError:
            return True
        except OSError:
            return False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > _MESSAGE_BYTES:
            raise ValueError("a message does not end")
        self.heard = time.monotonic()
        for line in lines:
            step, finished, lost = _parse(line, self.step)
            self.finished, self.lost = self.finished or finished, self.lost or lost
            if step != self.step:
                self.step, self.moved = step, self.heard
        return bool(data)


def _parse(line: bytes, step: int) -> tuple[int, bool, str]:
    """What a message says of its sender's step (`step` where it says nothing), its end and a lost process."""
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("a message is nested too deeply") from error
    if not isinstance(message, dict):
        raise ValueError("a message is no dict")
    step, finished, lost = message.get("step", step), message.get("finished", False), message.get("lost", "")
    if not (isinstance(step, int) and isinstance(finished, bool) and isinstance(lost, str)):
        raise ValueError("a message holds values of the wrong type")
    return step, finished, printable(lost)


def connect(
    from_first: Callable[[Any], Any], coordinator: str | None, peer_timeout_s: float, stall_timeout_s: float
) -> Peers:
    """Connect process 0 with every other one; arguments and errors are those of `handshake.meet`."""
    connected: Connected = {}
    if jax.process_count() > 1:
        name = _name_of_this_process()
        connected = meet(from_first, jax.process_index(), jax.process_count(), name, coordinator)
    connections = {process: _Connection(*socket_and_name) for process, socket_and_name in connected.items()}
    return Peers(connections, peer_timeout_s, stall_timeout_s)


def end_process(code: int, line: str = "") -> NoReturn:
    """End at once, whatever other threads wait for, with a last line on stderr."""
    sys.stdout.flush()
    if line:
        print(line, file=sys.stderr)
    sys.stderr.flush()
    os._exit(code)


def _name_of_this_process() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"
