"""Process 0's watch port with strangers at it, and what a connected process may send: real sockets."""

import contextlib
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import two_process_flags
from test_hosts import run_body

from maskdit_jax.distributed import handshake, peers
from maskdit_jax.distributed.handshake import Connected, Meeting, Reception, bind_address, listen, meet, reach

ROOT = Path(__file__).parent.parent
TOKEN, WELCOME = "a" * 64, "b" * 64


@contextlib.contextmanager
def reception(count: int = 2, timeout_s: float = 10.0) -> Iterator[tuple[Meeting, Future[Connected]]]:
    """Process 0 as it waits for the others in a thread of its own, and what it finds."""
    with listen("127.0.0.1") as server, ThreadPoolExecutor(1) as pool:
        meeting = Meeting(["127.0.0.1"], server.getsockname()[1], TOKEN, WELCOME, "first")
        yield meeting, pool.submit(Reception(server, count, meeting).gather, timeout_s)


def stranger(meeting: Meeting, says: bytes = b"") -> socket.socket:
    connected = socket.create_connection((meeting.hosts[0], meeting.port), timeout=10)
    connected.sendall(says)
    return connected


def is_dropped(connected: socket.socket) -> bool:
    try:
        return connected.recv(1) == b""
    except ConnectionResetError:
        return True


def finish(meeting: Meeting, found: Future[Connected], processes: range = range(1, 2)) -> Connected:
    """The other processes come; what process 0 has found."""
    theirs = {i: reach(meeting, i, f"name of {i}", timeout_s=5) for i in processes}
    mine = found.result(timeout=5)
    assert {i: name for i, (_, name) in mine.items()} == {i: f"name of {i}" for i in processes}
    for i, connected in theirs.items():
        assert mine[i][0].getpeername() == connected.getsockname()
        connected.close()
        mine[i][0].close()
    return mine


WRONG_HELLOS = {
    "bytes that are no UTF-8": b"\xff\xfe\x80\n",
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a wrong token": b"c" * 64 + b" 1 stranger\n",
    "the start of the token": TOKEN[:-1].encode() + b" 1 stranger\n",
    "the token alone": TOKEN.encode() + b"\n",
    "the number of process 0": f"{TOKEN} 0 x\n".encode(),
    "a number too high": f"{TOKEN} 2 x\n".encode(),
    "a negative number": f"{TOKEN} -1 x\n".encode(),
    "no number": f"{TOKEN} one x\n".encode(),
    "5,000 digits": f"{TOKEN} {'1' * 500} x\n".encode(),
    "more than a hello": f"{TOKEN} 1 x\nmore".encode(),
    "a line too long": f"{TOKEN} 1 {'x' * 2000}\n".encode(),
    "an empty line": b"\n",
}


@pytest.mark.parametrize("says", WRONG_HELLOS.values(), ids=WRONG_HELLOS)
def test_stranger_on_the_watch_port_is_dropped_and_the_others_meet(says):
    with reception() as (meeting, found), stranger(meeting, says) as connected:
        assert is_dropped(connected)
        finish(meeting, found)


def test_silent_stranger_delays_nobody_and_is_dropped_in_time(monkeypatch):
    monkeypatch.setattr(handshake, "_HELLO_WITHIN_S", 0.3)
    with reception(count=3) as (meeting, found), stranger(meeting, TOKEN.encode()) as silent:
        started = time.monotonic()
        first = reach(meeting, 1, "first to come")
        assert time.monotonic() - started < 0.3
        assert is_dropped(silent)
        second = reach(meeting, 2, "second")
        assert sorted(found.result(timeout=5)) == [1, 2]
        for connected in (first, second, *(one for one, _ in found.result().values())):
            connected.close()


def test_endless_line_is_cut_off_and_takes_no_memory():
    with reception() as (meeting, found), stranger(meeting) as connected:
        tracemalloc.start()
        with pytest.raises(OSError):
            for _ in range(256):
                connected.sendall(b"x" * 2**20)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        finish(meeting, found)
    assert peak < 3 * 2**20  # of which the stranger's own line takes one or two


def test_flood_of_silent_strangers_leaves_room_for_the_others():
    with reception(count=4) as (meeting, found), contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(stranger(meeting)) for _ in range(200)]
        started = time.monotonic()
        finish(meeting, found, range(1, 4))
        assert time.monotonic() - started < 3
        assert all(map(is_dropped, strangers))


def test_no_more_than_64_strangers_are_kept_waiting():
    with reception() as (meeting, found), contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(stranger(meeting)) for _ in range(100)]
        for connected in strangers[:36]:
            assert is_dropped(connected)
        for connected in strangers[36:]:
            connected.settimeout(0)
            with pytest.raises(BlockingIOError):
                connected.recv(1)
        finish(meeting, found)


def test_number_of_a_process_is_not_given_twice():
    with reception(count=3) as (meeting, found), reach(meeting, 1, "name of 1") as connected:
        with stranger(meeting, f"{TOKEN} 1 another\n".encode()) as second:
            assert is_dropped(second)
        with reach(meeting, 2, "name of 2"):
            mine = found.result(timeout=5)
        assert mine[1][1] == "name of 1"
        assert mine[1][0].getpeername() == connected.getsockname()
        for one, _ in mine.values():
            one.close()


def test_processes_that_do_not_come_are_named():
    with (
        reception(count=4, timeout_s=0.5) as (meeting, found),
        reach(meeting, 2, "the only one") as connected,
    ):
        with pytest.raises(TimeoutError, match=r"no word from processes 1, 3 within 0\.5 s"):
            found.result(timeout=5)
        assert is_dropped(connected)


def test_watch_port_is_closed_as_soon_as_all_are_connected():
    """All of `meet` in two threads; what process 0 tells the other reaches it as JAX would bring it."""
    said: queue.Queue = queue.Queue()

    def from_first(value):
        if threading.current_thread() is not first:
            return said.get(timeout=5)
        said.put(json.loads(json.dumps(value)))
        return value

    found = []
    first = threading.Thread(target=lambda: found.append(meet(from_first, 0, 2, "first", "localhost")))
    first.start()
    theirs = meet(from_first, 1, 2, "second", "localhost")
    first.join(5)
    assert [found[0][1][1], theirs[0][1]] == ["second", "first"]
    # The port of the connection on process 0's side is the one it listened at.
    host, port = theirs[0][0].getpeername()
    assert host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port), timeout=5)
    theirs[0][0].close()
    found[0][1][0].close()


def test_process_whose_connection_is_dropped_comes_again():
    with listen("127.0.0.1") as server, ThreadPoolExecutor(1) as pool:
        meeting = Meeting(["127.0.0.1"], server.getsockname()[1], TOKEN, WELCOME, "first")
        comes = pool.submit(reach, meeting, 1, "name of 1", 5)
        server.accept()[0].close()
        found = Reception(server, 2, meeting).gather(5)
        with comes.result(timeout=5) as connected, found[1][0] as mine:
            assert mine.getpeername() == connected.getsockname()


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.9\r\n" * 4, b"", TOKEN.encode() + b"\n"])
def test_somebody_else_is_not_taken_for_process_0(answer):
    """Also not a server that says back what it hears."""
    with listen("127.0.0.1") as server, ThreadPoolExecutor(1) as pool:
        meeting = Meeting(["127.0.0.1"], server.getsockname()[1], TOKEN, WELCOME, "first")
        comes = pool.submit(reach, meeting, 1, "name of 1", 0.2)
        with server.accept()[0] as connected:
            connected.recv(1000)
            connected.sendall(answer)
        with pytest.raises(OSError, match=r"127\.0\.0\.1:\d+: "):
            comes.result(timeout=5)


def test_secrets_of_a_run_have_256_bits_and_are_new_each_time():
    told: list = []

    class EnoughError(Exception):
        pass

    def stop(value):
        told.append(Meeting(*value))
        raise EnoughError

    for _ in range(2):
        with pytest.raises(EnoughError):
            meet(stop, 0, 2, "first", "localhost")
    words = [word for meeting in told for word in (meeting.token, meeting.welcome)]
    assert len(set(words)) == 4
    assert {len(bytes.fromhex(word)) for word in words} == {32}


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("localhost", "127.0.0.1"),
        ("127.0.0.1", "127.0.0.1"),
        ("198.51.100.1", ""),  # an address that no host has
        ("no.such.host.invalid", ""),
        (None, ""),
    ],
)
def test_watch_port_is_open_where_the_others_reach_process_0(host, address):
    assert bind_address(host) == address


WRONG_MESSAGES = {
    "bytes that are no UTF-8": b"\xff\xfe\n",
    "no JSON": b"{step: 3}\n",
    "a list": b"[1, 2]\n",
    "deep nesting": b"[" * 10_000 + b"\n",
    "a step that is a text": b'{"step": "3"}\n',
    "a step of 5,000 digits": b'{"step": ' + b"1" * 5000 + b"}\n",
    "a reason that is a list": b'{"lost": []}\n',
    "a line that does not end": b"x" * 50_000,
}


@pytest.mark.parametrize("message", WRONG_MESSAGES.values(), ids=WRONG_MESSAGES)
def test_damaged_message_of_a_connected_process_is_noticed(message):
    mine, other = socket.socketpair()
    with mine, other:
        connection = peers._Connection(mine, "other")
        other.sendall(b'{"step": 3}\n' + message)
        with pytest.raises(ValueError):
            for _ in range(4):  # 16 KiB at a time
                connection.receive()
        assert len(connection._buffer) <= 2 * peers._MESSAGE_BYTES


def test_messages_between_processes_are_understood_in_any_pieces():
    mine, other = socket.socketpair()
    with mine, other:
        sender, connection = peers._Connection(other, "me"), peers._Connection(mine, "other")
        sender.send({"step": 3})
        assert connection.receive()
        assert (connection.step, connection.finished, connection.lost) == (3, False, "")
        for part in (b'{"lo', b'st": "it brea', b'ks\\n!"}\n{"finished": true}\n'):
            other.sendall(part)
            assert connection.receive()
        assert (connection.step, connection.finished, connection.lost) == (3, True, r"it breaks\n!")


TRAIN = {
    "method.network.hidden_size": 64,
    "method.network.depth": 1,
    "method.network.num_heads": 2,
    "method.network.decoder_hidden_size": 32,
    "method.network.decoder_depth": 1,
    "method.network.decoder_num_heads": 2,
    "training.num_steps": 100_000,
    "training.batch_size": 16,
    "report.every_steps": 1,
    "report.tensorboard": "false",
    "report.preview_steps": 0,
}
# Process 1 says where the watch port is, and gives strangers some time there before it comes itself.
LATE = """
import runpy, time
from maskdit_jax.distributed import handshake
reach = handshake.reach
def late(meeting, *arguments):
    print("port", meeting.port, flush=True)
    time.sleep(3)
    return reach(meeting, *arguments)
handshake.reach = late
runpy.run_module("maskdit_jax.main", run_name="__main__", alter_sys=True)
"""


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.processes
def test_run_of_two_processes_is_not_disturbed_by_strangers(tmp_path):
    """Before it, at the watch port: garbage, silence, an endless line, a wrong token. During it: no port."""
    flags = [f"--config={ROOT / 'configs/digits.py'}", f"--workdir={tmp_path}", *two_process_flags()]
    flags += [f"--config.{name}={value}" for name, value in TRAIN.items()]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    run = [
        subprocess.Popen(
            [sys.executable, *command, *flags, f"--process_id={i}"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i, command in enumerate([["-m", "maskdit_jax.main"], ["-c", LATE]])
    ]
    try:
        port = int(next(line for line in run[1].stdout if line.startswith("port ")).split()[1])
        meeting, before = Meeting(["127.0.0.1"], port, TOKEN, WELCOME, ""), resident_bytes(run[0].pid)
        with contextlib.ExitStack() as stack:
            silent = [stack.enter_context(stranger(meeting)) for _ in range(100)]
            for says in WRONG_HELLOS.values():
                assert is_dropped(stack.enter_context(stranger(meeting, says)))
            with pytest.raises(OSError):
                endless = stack.enter_context(stranger(meeting))
                for _ in range(256):
                    endless.sendall(b"x" * 2**20)
            assert resident_bytes(run[0].pid) - before < 16 * 2**20
            assert all(map(is_dropped, silent))
        next(line for line in run[0].stdout if line.startswith("step 5/"))
        with pytest.raises(ConnectionRefusedError):
            stranger(meeting)
        run[0].send_signal(signal.SIGTERM)
        ended = [process.communicate(timeout=60) for process in run]
    finally:
        for process in run:
            process.kill()
    assert [process.returncode for process in run] == [75, 75], ended
    assert "is saved; the same command goes on" in ended[0][0]


@pytest.mark.processes
def test_process_that_sends_damaged_messages_counts_as_lost():
    (code, _, error), _ = run_body(
        """
    if index == 1:
        peers._connections[0].socket.sendall(b"\\xff\\n")
    time.sleep(20)
"""
    )
    assert code == 76
    assert re.search(
        r"^error: process 1 \(pid \d+ on .*\) sent a damaged message: 'utf-8' codec", error, re.M
    )
    assert "Traceback" not in error
