"""The processes of a run watch each other: when one dies, hangs or fails, the others end and say which.

Process 0 is connected with every other one, and passes on what it learns. JAX notices a lost process too,
but late or with an abort that names nobody.
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax

PEER_LOST = 76  # exit code of a process that ends because another one did
_TICK_S = 1.0
_HELLO_TIMEOUT_S = 30.0


class Peers:
    """The other processes of this run; alone when there are none.

    Every second a process tells that it lives, and at which step it is. It is lost when its
    connection closes unannounced, when nothing was heard of it for `peer_timeout_s`, or when for
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
                open_ = connection.receive()
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
                    f"process {process} ({connection.name}) hangs: nothing was heard of it for "
                    f"{self._timeout_s:g} s"
                )

    def _check_stall(self, now: float) -> None:
        for process, connection in self._connections.items():
            behind = not connection.finished and connection.step < self._step
            if behind and now - connection.moved > self._stall_s:
                self._end(
                    f"process {process} ({connection.name}) hangs: it is at step {connection.step:,} for "
                    f"{self._stall_s:g} s, while process {jax.process_index()} waits at step {self._step:,}"
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
        """Take in what has come; False when the other side has closed."""
        try:
            data = self.socket.recv(2**16)
        except TimeoutError:
            return True
        except OSError:
            return False
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self.heard = time.monotonic()
        for line in lines:
            message = json.loads(line)
            self.finished |= message.get("finished", False)
            self.lost = self.lost or message.get("lost", "")
            if message.get("step", self.step) != self.step:
                self.step, self.moved = message["step"], self.heard
        return bool(data)


def connect(from_first: Any, peer_timeout_s: float, stall_timeout_s: float) -> Peers:
    """Connect process 0 with every other one. from_first(value): what process 0 calls it with, everywhere.

    Raises:
      OSError: a process does not reach process 0.
    """
    index, count = jax.process_index(), jax.process_count()
    if count == 1:
        return Peers({}, peer_timeout_s, stall_timeout_s)
    server = socket.create_server(("", 0), backlog=count) if index == 0 else None
    token = secrets.token_hex(8)
    port = server.getsockname()[1] if server else 0
    port, hosts, token, name = from_first([port, _own_addresses(), token, _name_of_this_process()])
    if server is None:
        connected = _reach(hosts, port)
        connected.sendall(f"{token} {index} {_name_of_this_process()}\n".encode())
        return Peers({0: _Connection(connected, name)}, peer_timeout_s, stall_timeout_s)

    connections: dict[int, _Connection] = {}
    server.settimeout(_HELLO_TIMEOUT_S)
    with server:
        while len(connections) < count - 1:
            connected, _ = server.accept()
            connected.settimeout(_HELLO_TIMEOUT_S)
            hello = connected.makefile().readline().split(maxsplit=2)
            if len(hello) == 3 and hello[0] == token:  # anything else is a stranger
                connections[int(hello[1])] = _Connection(connected, hello[2].strip())
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


def _own_addresses() -> list[str]:
    """Names and addresses under which others may reach this host."""
    addresses = [socket.gethostname()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: the system only picks the interface
        addresses.append(probe.getsockname()[0])
    return [*addresses, "localhost"]


def _reach(hosts: list[str], port: int) -> socket.socket:
    for host in hosts[:-1]:
        with contextlib.suppress(OSError):
            return socket.create_connection((host, port), timeout=_HELLO_TIMEOUT_S / len(hosts))
    return socket.create_connection((hosts[-1], port), timeout=_HELLO_TIMEOUT_S)
