"""How the C library gives out memory to a command that computes on the CPU."""

import ctypes
import importlib.metadata
import importlib.util
import os

import jax

SWITCH = "MASKDIT_JAX_KEEP_MEMORY"
# glibc's malloc.h: one heap for all threads, no blocks outside of it, and none of it is returned.
_M_ARENA_MAX, _M_MMAP_MAX, _M_TRIM_THRESHOLD = -8, -4, -1
_KEEP = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))


def keep_memory() -> bool:
    """With MASKDIT_JAX_KEEP_MEMORY=1, on a CPU, keep the memory that a step has freed; whether that is so.

    XLA takes a step's memory from malloc, and glibc returns it to the system, which then fills every
    page with zeros again. One heap that never shrinks spares that, but all threads wait for its lock:
    programs take half as long again to compile and small steps up to twice as long, so it has to be
    asked for. To be called before JAX's devices are: a thread stays with the heap that it began with.
    Nothing is done where an accelerator may be used, or where the C library is none that can do it.
    """
    if os.environ.get(SWITCH) != "1":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None or not _cpu_only():
        return False
    return all(mallopt(parameter, value) for parameter, value in _KEEP)


def _cpu_only() -> bool:
    """Whether JAX will compute on the CPU, without asking it, which would create its threads."""
    if platforms := getattr(jax.config, "jax_platforms", None):
        return platforms.split(",")[0] == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
