"""How the processes of a run meet at process 0's watch port, and how strangers there are kept out.

Process 0 makes two secrets for each run and tells them, through JAX, to the other processes alone. Who
says the first is heard; process 0 answers with the second, so that nobody else is taken for it. The port
is closed as soon as all are connected.
"""

import contextlib
import hmac
import ipaddress
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from maskdit_jax.errors import printable

_MEET_WITHIN_S = 30.0
# A process says its hello in the moment it connects: only a stranger takes longer, or has more to say.
_HELLO_WITHIN_S = 5.0
_HELLO_BYTES = 1024
_MAX_WAITING = 64  # connections that have not said hello; they must not exhaust the process's descriptors
_TICK_S = 0.25
_SECRET_BYTES = 32

Connected = dict[int, tuple[socket.socket, str]]  # of each process its socket and what it calls itself


class Meeting(NamedTuple):
    """What a process must know to meet process 0."""

    hosts: list[str]  # names and addresses to try, in this order
    port: int
    token: str  # what it says
    welcome: str  # what process 0 answers
    name: str  # of process 0


def meet(
    from_first: Callable[[Any], Any], index: int, count: int, name: str, coordinator: str | None
) -> Connected:
    """Connect process 0 with every other one of `count`.

    Args:
      from_first: from_first(value) is what process 0 calls it with, in every process.
      name: of this process, for messages.
      coordinator: host under which all reach process 0; None where only a launcher knows.

    Raises:
      OSError: a process does not reach process 0.
    """
    address = bind_address(coordinator)
    with contextlib.ExitStack() as stack:
        port, server = 0, None
        if index == 0:
            server = stack.enter_context(listen(address))
            port = server.getsockname()[1]
        hosts = [address] if address else [*filter(None, [coordinator]), *_own_addresses()]
        token, welcome = secrets.token_hex(_SECRET_BYTES), secrets.token_hex(_SECRET_BYTES)
        meeting = Meeting(*from_first([hosts, port, token, welcome, name]))
        if server is None:
            return {0: (reach(meeting, index, name), meeting.name)}
        return Reception(server, count, meeting).gather()


def bind_address(host: str | None) -> str:
    """The one address at which the others reach this host under the name `host`; "" for all addresses.

    All where that cannot be known: no name, a name of several addresses, or of none that this host has
    (behind a router). Many systems give their own name a loopback address, which others cannot reach.
    """
    if not host:
        return ""
    host = host.strip("[]")
    with contextlib.suppress(OSError):
        found = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        loopback = sorted(a for a in found if ipaddress.ip_address(a.partition("%")[0]).is_loopback)
        if len(loopback) == len(found):
            # 127.0.0.1 sorts before ::1, which not every system has.
            return loopback[0] if host == "localhost" or host in found else ""
        if len(found) == 1:
            (address,) = found
            listen(address).close()  # fails where the address is not this host's
            return address
    return ""


def listen(address: str, port: int = 0) -> socket.socket:
    """A listening socket at an address, "" for all addresses; port 0: any that is free."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=2 * _MAX_WAITING)


class Reception:
    """Takes in the processes 1 … count - 1 at a listening socket, and keeps everybody else out.

    All who have connected are heard at the same time, without waiting for any. Who does not say hello in
    time, says too much or something else is dropped; when too many wait, the one who has waited longest.
    A dropped process comes again: see `reach`.
    """

    def __init__(self, server: socket.socket, count: int, meeting: Meeting):
        self._server, self._count, self._meeting = server, count, meeting
        self._selector = selectors.DefaultSelector()
        self._waiting: dict[
            socket.socket, tuple[float, bytes]
        ] = {}  # since when, what was said; oldest first
        self._found: Connected = {}

    def gather(self, timeout_s: float = _MEET_WITHIN_S) -> Connected:
        """The others' connections, when all are here.

        Raises:
          TimeoutError: they are not, after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)
        try:
            while missing := sorted(set(range(1, self._count)) - self._found.keys()):
                now = time.monotonic()
                if now > deadline:
                    names = ", ".join(map(str, missing))
                    processes = "process" if len(missing) == 1 else "processes"
                    raise TimeoutError(f"no word from {processes} {names} within {timeout_s:g} s")
                self._drop(
                    [one for one, (since, _) in self._waiting.items() if now - since > _HELLO_WITHIN_S]
                )
                for key, _ in self._selector.select(_TICK_S):
                    if key.fileobj is self._server:
                        self._accept()
                    elif key.fileobj in self._waiting:  # not dropped a moment ago to make room
                        self._hear(key.fileobj)
        except BaseException:
            for connected, _ in self._found.values():
                connected.close()
            raise
        finally:
            self._drop(list(self._waiting))
            self._selector.close()
        return self._found

    def _accept(self) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            self._drop([next(iter(self._waiting))])
        try:
            connected, _ = self._server.accept()
        except OSError:  # it has left again
            return
        connected.setblocking(False)
        self._waiting[connected] = time.monotonic(), b""
        self._selector.register(connected, selectors.EVENT_READ)

    def _hear(self, connected: socket.socket) -> None:
        since, said = self._waiting[connected]
        try:
            data = connected.recv(_HELLO_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        said += data
        line, newline, rest = said.partition(b"\n")
        if not newline and data and len(said) <= _HELLO_BYTES:
            self._waiting[connected] = since, said
            return
        process, name = self._parse(line) if newline and not rest else (0, "")
        if process:
            with contextlib.suppress(OSError):
                connected.sendall(f"{self._meeting.welcome}\n".encode())
                self._selector.unregister(connected)
                del self._waiting[connected]
                self._found[process] = connected, name
                return
        self._drop([connected])

    def _parse(self, line: bytes) -> tuple[int, str]:
        """Number and name of the process that says this; 0 for a stranger."""
        words = line.split(b" ", 2)
        if len(words) < 3 or not hmac.compare_digest(words[0], self._meeting.token.encode()):
            return 0, ""
        expected = {str(i).encode(): i for i in range(1, self._count) if i not in self._found}
        return expected.get(words[1], 0), printable(words[2].decode(errors="replace"))

    def _drop(self, strangers: Iterable[socket.socket]) -> None:
        for connected in strangers:
            del self._waiting[connected]
            self._selector.unregister(connected)
            connected.close()


def reach(meeting: Meeting, index: int, name: str, timeout_s: float = _MEET_WITHIN_S) -> socket.socket:
    """A connection with process 0, which knows now that this is process `index`; tried until it is heard.

    Raises:
      OSError: process 0 is not reached within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        for host in meeting.hosts:
            # One address that swallows everything must not take the time of the others.
            give_up = min(deadline, time.monotonic() + timeout_s / len(meeting.hosts))
            try:
                return _introduce(host, meeting, index, name, give_up)
            except OSError as error:
                if time.monotonic() + _TICK_S > deadline:
                    raise OSError(f"{host}:{meeting.port}: {error}") from error
        time.sleep(_TICK_S)


def _introduce(host: str, meeting: Meeting, index: int, name: str, deadline: float) -> socket.socket:
    def left_s() -> float:
        return max(deadline - time.monotonic(), 0.1)

    connected = socket.create_connection((host, meeting.port), timeout=left_s())
    try:
        connected.sendall(f"{meeting.token} {index} {name}\n".encode())
        expected, answer = f"{meeting.welcome}\n".encode(), b""
        while len(answer) < len(expected):
            connected.settimeout(left_s())
            data = connected.recv(len(expected) - len(answer))
            if not data or time.monotonic() > deadline:
                raise ConnectionError("process 0 does not answer there")
            answer += data
        if not hmac.compare_digest(answer, expected):
            raise ConnectionError("somebody else answers there")
    except BaseException:
        connected.close()
        raise
    return connected


def _own_addresses() -> list[str]:
    """Names and addresses under which others may reach this host."""
    addresses = [socket.gethostname()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: the system only picks the interface
        addresses.append(probe.getsockname()[0])
    return [*addresses, "localhost"]
