"""Every test runs on the CPU with eight virtual devices; a broadcast that adds a dimension is an error.

Compiling is what these tests would mostly wait for. So it is done in haste, and once: this process and the
commands it starts share a cache that lives as long as the test run. Haste leaves out rewrites of a program,
not parts of it: what is compared with other numbers has a tolerance, what must have the same bits is
compiled alike on both sides. tests/golden_through_import.py and README's command are compiled as users do.
"""

import contextlib
import gc
import io
import logging
import os
import tempfile

import jaxlib

CACHE = tempfile.TemporaryDirectory(prefix="maskdit_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# The older emitters make a third of the LLVM code. A flag that XLA does not know would end the process, so
# only those versions get it that are known to have it.
if jaxlib.version.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"

import jax  # noqa: E402, what is set above counts when JAX starts
import pytest  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _quiet_libraries():
    """What Orbax and its threads say of errors that the package catches and reports; as its commands do."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


@pytest.fixture(autouse=True)
def _console_as_it_was():
    """A command, called in a test, takes the package's messages to its console: afterwards they are free."""
    log = logging.getLogger("maskdit_jax")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = before[:2]
    log.setLevel(before[2])


@pytest.fixture(autouse=True, scope="module")
def _memory_given_back():
    """A file's programs are not the next one's, and what these share is on disk: else all of them add up."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def compiled_as_users_do():
    """Without this file's haste."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def messages(caplog):
    """What the package logs reaches `caplog`, even where a command has taken its messages to the console."""
    log = logging.getLogger("maskdit_jax")
    before = log.handlers, log.propagate
    log.handlers, log.propagate = [], True
    caplog.set_level(logging.INFO, "maskdit_jax")
    yield
    log.handlers, log.propagate = before


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The finished tiny run, which reported everything: its folder, and what the command said.

    Tests share it, so they only read it.
    """
    from tiny import REPORTED, tiny_flags

    from maskdit_jax import main

    workdir = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main.main([f"--workdir={workdir}", *tiny_flags(REPORTED)])
    logging.getLogger("maskdit_jax").handlers = []
    return workdir, said.getvalue()


@pytest.fixture
def run(finished):
    """Folder of the finished tiny run, to read."""
    return finished[0]


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A small autoencoder of the published kind: 8 times smaller latents of four channels."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
    )
    path = tmp_path_factory.mktemp("vae") / "small"
    model.save_pretrained(path)
    return path


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
