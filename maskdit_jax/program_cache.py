"""Where commands keep compiled programs, so that the next command need not compile them again."""

import os
import platform
import zlib
from pathlib import Path
from typing import Any

import jax

# Of each program JAX keeps, by default, what took a second; a run has dozens of smaller ones.
_LEAST_S = 0.1


def keep_programs() -> str | None:
    """Let JAX keep compiled programs in the user's cache folder; where that is, None: nowhere.

    To be called before anything is compiled. JAX's own settings go first: JAX_COMPILATION_CACHE_DIR names
    another folder, JAX_ENABLE_COMPILATION_CACHE=false turns it off. JAX tells programs apart by what makes
    them; home folders are shared by machines, so each kind of CPU has a folder here. What cannot be read
    is compiled, with a warning.
    """
    if not _setting("jax_enable_compilation_cache") or _setting("jax_compilation_cache_dir"):
        return kept_programs()
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(home) / "maskdit_jax" / f"programs-{_kind_of_cpu()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or it is read-only
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_S)
    return str(folder)


def kept_programs() -> str | None:
    """Where this process keeps compiled programs, if it does."""
    return _setting("jax_compilation_cache_dir") if _setting("jax_enable_compilation_cache") else None


def _setting(name: str) -> Any:
    return getattr(jax.config, name)


def _kind_of_cpu() -> str:
    """Of its type and instructions, as Linux lists them."""
    lines = [platform.machine(), platform.processor()]
    file = Path("/proc/cpuinfo")
    if file.exists():
        names = ("model name", "flags", "Features", "CPU part")
        lines += sorted({line for line in file.read_text().splitlines() if line.startswith(names)})
    return f"{zlib.crc32(os.linesep.join(lines).encode()):08x}"
