"""Configuration files: they may lie anywhere, and whatever is wrong with one is a line that says where."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from maskdit_jax.config import leaves, resolve
from maskdit_jax.config_file import RECIPES, load
from maskdit_jax.errors import UserError

START = "from configs import base\n\n\ndef get_config():\n    config = base.get_config()\n"
END = "    return config\n"


def body(*lines: str) -> str:
    """A file that starts from base, with these lines, of which the first is line 6."""
    return START + "".join(f"    {line}\n" for line in lines) + END


CASES = [  # what is wrong, the file, what the line must say
    ("syntax", "def get_config(:\n    pass\n", "line 1", "SyntaxError"),
    ("indentation", START + "      config.seed = 1\n" + END, "line 6", "IndentationError"),
    ("null bytes", "x = '\0'\n", "null bytes"),
    ("no text", "\x00\x01\xff\xfe", "null bytes"),
    ("another encoding", "# coding: klingon\n", "SyntaxError", "klingon"),
    ("empty", "", "no function get_config()"),
    ("get_config no function", "get_config = 3\n", "no function get_config()"),
    ("get_config with arguments", "def get_config(size):\n    return size\n", "TypeError", "size"),
    ("undefined name", body("config.seed = sed"), "line 6", "NameError", "'sed'"),
    ("misspelt variable", body("confg.seed = 3"), "line 6", "nearest: config"),
    (
        "misspelt function",
        START.replace("get_config()\n", "get_confg()\n") + END,
        "line 5",
        "nearest: get_config",
    ),
    ("misspelt recipe", "from configs import bas\n", "line 1", "nearest: base"),
    ("misspelt package", "from config import base\n", "line 1", "from configs import base"),
    ("misspelt module", "import configs.bas\n", "line 1", "configs.bas"),
    ("an exception", body("raise RuntimeError('no\\nway')"), "line 6", "RuntimeError: no"),
    ("an exception without words", body("raise RuntimeError"), "line 6", "RuntimeError"),
    ("an exit", body("raise SystemExit(3)"), "line 6", "SystemExit"),
    ("division by zero", body("config.seed = 1 // 0"), "line 6", "ZeroDivisionError"),
    ("endless recursion", body("return get_config()"), "line", "RecursionError"),
    ("nothing returned", START, "returned None", "return config"),
    ("a plain dict", "def get_config():\n    return {'seed': 1}\n", "returned a dict", "base.get_config()"),
    ("a section of base", START + "    return config.data\n", "'channels'", "data.channels"),
    (
        "a configuration of its own",
        "from maskdit_jax.config import ConfigDict\ndef get_config():\n    return ConfigDict({'seed': 3})\n",
        "checkpoint.every_steps is missing",
        "base.get_config()",
    ),
    (
        "misspelt option",
        body("config.training.batchsize = 8"),
        "line 6",
        "'batchsize'",
        "nearest: batch_size",
    ),
    (
        "in update",
        body("config.training.update(batchsize=8)"),
        "line 6",
        "'batchsize'",
        "nearest: batch_size",
    ),
    ("misspelt section", body("config.trainin.batch_size = 8"), "line 6", "'trainin'", "nearest: training"),
    ("in the wrong section", body("config.data.learning_rate = 1"), "line 6", "'learning_rate'"),
    ("an option of one's own", body("config.unlock()", "config.mine = 1"), "'mine'", "nearest: "),
    (
        "option a text",
        body("config.training.batch_size = 'many'"),
        "line 6",
        "batch_size=many",
        "a whole number",
    ),
    ("option None", body("config.training.batch_size = None"), "training.batch_size=None", "a whole number"),
    ("text None", body("config.vae = None"), "vae=None", "a text"),
    ("option a list", body("config.training.batch_size = [8]"), "line 6", "batch_size=[8]", "a whole number"),
    (
        "option a fraction",
        body("config.training.batch_size = 2.5"),
        "line 6",
        "batch_size=2.5",
        "a whole number",
    ),
    ("number true", body("config.seed = True"), "seed=True", "a whole number"),
    ("switch 1", body("config.report.tensorboard = 1"), "line 6", "tensorboard=1", "true or false"),
    ("section a number", body("config.training = 3"), "line 6", "training", "update(…)"),
    ("section a dict", body("config.unlock()", "config.data = {'flip': True}"), "data.channels is missing"),
    ("section deleted", body("config.unlock()", "del config.data"), "data.channels is missing"),
    ("network a number", body("config.method.network = 3"), "line 6", "network", "update(…)"),
    (
        "network a dict",
        body("config.unlock()", "config.method.network = {'depth': 1}"),
        "method.network.decoder_depth is missing",
    ),
    (
        "method deleted",
        body("config.unlock()", "del config.method"),
        "method.P_mean is missing",
        "base.get_config()",
    ),
    (
        "unknown method",
        START.replace("base.get_config()", "base.get_config('maskdot')") + END,
        "method.name='maskdot' is unknown",
        "known: maskdit",
    ),
    (
        "another name of the method",
        body("config.method.name = 'maskdot'"),
        "method.name='maskdot'",
        "maskdit",
    ),
    ("option of a layout before methods", body("config.model.depth = 3"), "line 6", "'model'", "method"),
    ("a number of 5,000 digits", body("config.seed = 10**5000"), "seed=", "a huge number", "4,294,967,295"),
    ("float beyond all", body("config.optimizer.eps = 1e-8 + 10**5000"), "OverflowError"),
]


@pytest.mark.parametrize(
    "text, fragments", [(case[1], case[2:]) for case in CASES], ids=[c[0] for c in CASES]
)
def test_mistake_in_a_file_is_one_line_that_says_where(text, fragments, tmp_path):
    file = tmp_path / "mine.py"
    file.write_bytes(text.encode("latin-1", "replace"))
    with pytest.raises(UserError) as caught:
        resolve(load(str(file)), device_count=8)
    line = str(caught.value)
    assert line.isprintable() and len(line) < 500
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize(
    "path, found",
    [
        ("digit", "digits.py"),
        ("configs/digit.py", "digits.py"),
        ("nowhere/at/all.py", "digits.py"),
        ("configs", "in256.py"),
        ("digits.yaml", "digits.py"),
    ],
)
def test_missing_file_names_the_one_meant(path, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such Python file; found: .*" + found):
        load(path)


def test_recipes_are_found_without_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = leaves(load(str(RECIPES / "digits.py")))
    for path in ("configs/digits.py", "digits.py", "digits"):
        assert leaves(load(path)) == expected


def test_a_file_of_that_name_goes_before_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/digits.py").write_text(body("config.seed = 5"))
    assert load("configs/digits.py").seed == 5


def test_a_file_imports_what_lies_beside_it_and_leaves_nothing_behind(tmp_path):
    """Two files, each with a module `common` of its own and a folder `configs` of its own."""
    for seed in (5, 6):
        folder = tmp_path / str(seed) / "configs"
        folder.mkdir(parents=True)
        (folder / "common.py").write_text(f"SEED = {seed}\n")
        (folder / "parent.py").write_text(body("config.mesh.fsdp = 2"))
        (folder / "mine.py").write_text(
            "import common\n"
            + body("config.seed = common.SEED").replace("import base", "import parent as base")
        )
    before = set(sys.modules)
    for seed in (5, 6):
        config = load(str(tmp_path / str(seed) / "configs" / "mine.py"))
        assert (config.seed, config.mesh.fsdp) == (seed, 2)
    assert not {name for name in set(sys.modules) - before if name.startswith(("common", "configs"))}


def test_line_of_a_recipe_that_is_imported_is_named(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "parent.py").write_text(body("config.sed = 1"))
    (folder / "mine.py").write_text("from configs import parent\nget_config = parent.get_config\n")
    with pytest.raises(UserError, match=r"parent\.py, line 6\): there is no option 'sed'; nearest: seed"):
        load(str(folder / "mine.py"))


def test_whole_number_is_taken_where_a_number_is_meant(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(body("config.optimizer.learning_rate = 1"))
    rate = load(str(file)).optimizer.learning_rate
    assert rate == 1 and type(rate) is float


@pytest.mark.slow
@pytest.mark.processes
def test_wheel_trains_without_the_checkout(tmp_path):
    """`pip wheel .`, installed into an environment without the checkout: its commands, in an empty folder."""
    root, tree, work = RECIPES.parent, tmp_path / "tree", tmp_path / "work"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if name.partition("/")[0] in ("maskdit_jax", "configs", "setup.py", "pyproject.toml", "README.md"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((root / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path, tree)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (wheel,) = tmp_path.glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    # The other packages of this environment, without its own link to the checkout, which only `site` reads.
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    packages = {Path(entry) for entry in sys.path if entry.endswith("site-packages")}
    (site / "others.pth").write_text("\n".join(map(str, packages)))

    work.mkdir()
    where = run(python, "-c", "import maskdit_jax; print(maskdit_jax.__file__)", cwd=work)
    assert Path(where.strip()).is_relative_to(site)
    (work / "mine.py").write_text(
        textwrap.dedent("""
        from configs import digits
        def get_config():
            config = digits.get_config()
            config.optimizer.learning_rate = 1e-3
            return config
    """)
    )
    short = ["--config.training.num_steps=3", "--config.evaluation.num_samples=0"]
    commands = tmp_path / "venv" / "bin"
    for config in ("digits", "mine.py"):
        train = (commands / "maskdit-train", f"--config={config}", f"--workdir=runs/{config}", *short)
        assert "finished at step 3" in run(*train, cwd=work)
    sample = (commands / "maskdit-sample", "--workdir=runs/digits", "--out=samples", "--seeds=0-1")
    assert "2 samples of step 3" in run(*sample, cwd=work)
    assert "checks passed" in run(commands / "maskdit-doctor", cwd=work)
    assert (site / "maskdit_jax" / "py.typed").is_file()


def run(*command, cwd=None) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
