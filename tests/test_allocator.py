"""Memory of a command on the CPU: kept where that is asked for, by the command, not by an import."""

import platform
import subprocess
import sys

import pytest
from tiny import command_environment

SCRIPT = """
import argparse, os, resource
import jax
from maskdit_jax.allocator import keep_memory
from maskdit_jax.distributed.hosts import add_flags, joined

def pages_of_another_array():
    counts = []
    for _ in range(3):
        bytearray(b'x') * 2**26
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return counts[2] - counts[1]

print(keep_memory())
os.environ["MASKDIT_JAX_KEEP_MEMORY"] = "1"
print(pages_of_another_array())
jax.config.update("jax_platforms", "cuda,cpu")
print(keep_memory())
jax.config.update("jax_platforms", "cpu")
print(pages_of_another_array())
parser = argparse.ArgumentParser()
add_flags(parser)
with joined(parser.parse_args([])):
    print(pages_of_another_array())
"""


@pytest.mark.processes
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_a_command_keeps_what_it_has_freed():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=command_environment(), capture_output=True, text=True, check=True
    )
    not_asked_for, imported, accelerator, untouched, in_command = done.stdout.split()
    pages = 2**26 // 2**12
    assert accelerator == not_asked_for == "False"
    assert int(imported) >= pages  # given back, and filled with zeros again
    assert int(untouched) >= pages
    assert int(in_command) < pages / 100
