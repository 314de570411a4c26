"""Every test runs on the CPU with eight virtual devices; a broadcast that adds a dimension is an error.

The programs compiled in one test run, in this process and in the commands it starts, share a cache.
"""

import logging
import os
import tempfile

CACHE = tempfile.TemporaryDirectory(prefix="maskdit_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402, the cache is set before
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def messages(caplog):
    """What the package logs reaches `caplog`, even where a command has taken its messages to the console."""
    log = logging.getLogger("maskdit_jax")
    before = log.handlers, log.propagate
    log.handlers, log.propagate = [], True
    caplog.set_level(logging.INFO, "maskdit_jax")
    yield
    log.handlers, log.propagate = before


MATRIX = pytest.StashKey[list]()


@pytest.fixture
def outcome(request):
    """Add a row to the matrix of failures: case, what happened, how the end compares."""
    return lambda *row: request.config.stash.setdefault(MATRIX, []).append(row)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash.get(MATRIX, [])
    if rows:
        terminalreporter.section("failures and how the run went on")
        for row in [("failure", "what happened", "final state"), ("---",) * 3, *rows]:
            terminalreporter.write_line(f"| {' | '.join(row)} |")
