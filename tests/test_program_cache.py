"""Compiled programs on disk: where commands keep them, whose word goes first, and what damage does."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny import command_environment

from maskdit_jax.program_cache import keep_programs

COMMAND = """
import argparse
import jax
import jax.numpy as jnp
from maskdit_jax.distributed.hosts import add_flags, joined

assert jax.config.jax_compilation_cache_dir is None
parser = argparse.ArgumentParser()
add_flags(parser)
with joined(parser.parse_args([])):
    hits = []
    jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if "cache_hits" in name else 0)
    x = jax.jit(lambda x: jnp.linalg.qr(jnp.sin(x @ x))[1].sum())(jnp.eye(3))
    print(float(x), len(hits))
"""


@pytest.fixture
def settings_as_they_were():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_folder_that_the_user_names_stays(settings_as_they_were):
    named = jax.config.jax_compilation_cache_dir
    assert keep_programs() == named == jax.config.jax_compilation_cache_dir


def test_without_a_home_that_can_be_written_nothing_is_kept(settings_as_they_were, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    assert keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None


@pytest.mark.processes
def test_programs_are_kept_found_again_and_made_anew_where_they_are_damaged(tmp_path):
    def command(**settings: str) -> list[str]:
        environment = {k: v for k, v in command_environment().items() if k != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"XDG_CACHE_HOME": str(tmp_path)} | settings
        done = subprocess.run(
            [sys.executable, "-c", COMMAND], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    def files() -> list[Path]:
        return [p for p in tmp_path.rglob("*") if p.is_file()]

    result, hits = command(JAX_ENABLE_COMPILATION_CACHE="false")
    assert (hits, files()) == ("0", [])
    assert command() == [result, "0"]
    kept = files()
    assert kept
    assert {p.parts[-3] for p in kept} == {"maskdit_jax"}
    assert int(command()[1]) >= 1
    for file in kept:
        os.truncate(file, file.stat().st_size // 2)
    assert command() == [result, "0"]
