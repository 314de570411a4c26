"""Imports go down only (DESIGN): the order of the layers, and what a part of the package does not load."""

import ast
import subprocess
import sys

from tiny import ROOT, command_environment

# A line may import from the lines above it; within a line anything goes.
LAYERS = [
    ["errors", "log", "files", "options", "program_cache"],
    ["models"],
    ["diffusion"],
    ["methods"],
    ["config", "config_dict", "saved_config", "config_file"],
    ["distributed", "interop", "data"],
    ["sampling"],
    ["evaluation"],
    ["training"],
    ["benchmark"],
    ["api", "exchange", "model_card", "finish", "sample_files", "seeds", "plots", "run"],
    ["main", "sample", "evaluate", "doctor"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
STRANGERS = [{"models", "diffusion"}, {"distributed", "interop"}]


def imported_parts(file):
    """Parts of the package that a file imports when it is itself imported, or within its functions."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("maskdit_jax"):
            names = node.module.split(".")[1:2] or [alias.name for alias in node.names]
            yield from names
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("maskdit_jax."))


def test_imports_go_down_only():
    package, wrong = ROOT / "maskdit_jax", []
    for file in sorted(package.rglob("*.py")):
        part = file.relative_to(package).parts[0].removesuffix(".py")
        if part == "__init__":  # the package's face, which loads what it is asked for
            continue
        assert part in LEVEL, f"{part} has no layer"
        for other in imported_parts(file):
            strangers = any({part, other} == pair for pair in STRANGERS)
            if LEVEL[other] > LEVEL[part] or strangers:
                wrong.append(f"{file.relative_to(ROOT)} imports {other}")
    assert not wrong


def test_nothing_of_the_package_imports_the_tools_or_the_tests():
    for file in (ROOT / "maskdit_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in ("tools", "tests", "configs"), file


def test_a_network_alone_loads_neither_orbax_nor_the_api():
    code = "import sys, maskdit_jax.models.maskdit; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=command_environment(), capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    ours = {name for name in loaded if name.startswith("maskdit_jax")}
    assert not {
        name for name in loaded if name.split(".")[0] in ("orbax", "grain", "tensorflow", "torch", "PIL")
    }
    assert {name.split(".")[1] for name in ours if "." in name} <= {"errors", "models", "options"}
