"""From a configuration file and overrides to a configuration; whatever is wrong with either is one line."""

import builtins
import contextlib
import numbers
import re
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maskdit_jax.config import ConfigDict, defaults, leaves
from maskdit_jax.errors import UserError, first_line, known, shown
from maskdit_jax.methods import METHODS
from maskdit_jax.options import IN_WORDS

# The recipes stand beside the package in a checkout, and inside it where it was installed from a wheel.
_PACKAGE = Path(__file__).parent
RECIPES = next(
    (folder for folder in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if folder.is_dir()),
    _PACKAGE / "configs",
)


def load(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Configuration of a Python file, with overrides such as `--config.training.num_steps=10`.

    The file defines `get_config()`. It may lie anywhere; it imports the recipes as `from configs import
    base`. A recipe needs no file where the package is installed: `configs/digits.py` names it too.

    Raises:
      UserError: no such file; an error in it, with the line; an option that is unknown (the message
        names the nearest ones), missing or of the wrong type.
    """
    file = _find(path)
    config = _run(file, path)
    check_known_options(config, path)
    for override in overrides:
        _apply(config, override)
    return config


def _find(path: str) -> Path:
    file = Path(path)
    if file.is_file() and file.suffix == ".py":
        return file
    recipe = RECIPES / f"{file.stem}.py"
    if file.parent in (Path(), Path("configs")) and file.suffix in ("", ".py") and recipe.is_file():
        return recipe
    folder = file.parent if file.parent.is_dir() and file.suffix == ".py" else Path("configs")
    places = {folder, RECIPES} if folder == Path("configs") else {folder}
    files = {p.name for place in places for p in place.glob("*.py") if p.stem not in ("__init__", "base")}
    names = [str(folder / name) for name in files]
    raise UserError(f"--config={path}: no such Python file; found: {known(path, sorted(names)) or 'none'}")


def _run(file: Path, name: str) -> ConfigDict:
    """What `get_config()` of a file returns."""
    module = types.ModuleType("config")
    module.__file__ = str(file)
    with _imports_recipes(file):
        try:
            exec(compile(file.read_bytes(), str(file), "exec"), vars(module))
            if not callable(vars(module).get("get_config")):
                raise UserError(
                    f"--config={name} has no function get_config(): define one that starts with "
                    "`config = base.get_config()` and ends with `return config`"
                )
            config = module.get_config()
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            where = _line_of(error, file)
            raise UserError(f"--config={name}{where}: {_explain(error)}") from error
    if not isinstance(config, ConfigDict):
        found = "None" if config is None else f"a {type(config).__name__}"
        raise UserError(
            f"--config={name}: get_config() returned {found}, expected the ConfigDict of `config = "
            "base.get_config()`; end it with `return config`"
        )
    return config


@contextlib.contextmanager
def _imports_recipes(file: Path) -> Iterator[None]:
    """Within the block `configs` is the package of the recipes, and modules beside `file` can be imported.

    A file in a folder that is itself called `configs` finds that folder's modules first. Nothing stays
    behind: another file, loaded later, may have other modules of the same names.
    """
    folder, before, path = file.resolve().parent, dict(sys.modules), sys.path

    def is_recipe(name: str) -> bool:
        return name.partition(".")[0] == "configs"

    package = types.ModuleType("configs")
    package.__path__ = [str(folder), str(RECIPES)] if folder.name == "configs" else [str(RECIPES)]
    for name in filter(is_recipe, before):
        del sys.modules[name]
    sys.modules["configs"] = package
    sys.path = [*path, str(folder)]  # last: it must not hide a package
    try:
        yield
    finally:
        sys.path = path
        for name, module in list(sys.modules.items()):
            beside = Path(getattr(module, "__file__", None) or "/").parent == folder
            if is_recipe(name) or (beside and name not in before):
                del sys.modules[name]
        sys.modules.update({name: before[name] for name in filter(is_recipe, before)})


def _all_options() -> dict[str, Any]:
    """Every option of every method, with a default."""
    return {name: value for method in METHODS for name, value in leaves(defaults(method)).items()}


def _line_of(error: BaseException, file: Path) -> str:
    """Such as ", line 7", of the file itself, or of another configuration that it imports."""
    if isinstance(error, SyntaxError) and error.filename:
        lines = [(error.filename, error.lineno)]
    else:
        lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    own = [number for name, number in lines if name == str(file)]
    if own:
        return f", line {own[-1]}"
    others = [f" (in {name}, line {number})" for name, number in lines if "configs" in Path(name).parts]
    return others[-1] if others else ""


def _explain(error: BaseException) -> str:
    """What went wrong, and the nearest known name where one was misspelt."""
    reason: Any = error
    while isinstance(reason, BaseException) and reason.args and not isinstance(reason, OSError):
        reason = reason.args[0]  # ml_collections wraps one error in another
    text = str(reason)
    if isinstance(error, (AttributeError, KeyError)):
        # Of ml_collections, and of the ConfigDict that stands in for it.
        unknown = re.match(r"Key \"(\w+)\" does not exist|'(\w+)'(?: is unknown|\nDid you mean|$)", text)
        if unknown:
            name = unknown[1] or unknown[2]
            names = {part for option in _all_options() for part in option.split(".")}
            return f"there is no option {shown(repr(name))}; nearest: {known(name, names, how_many=3)}"
    if isinstance(error, TypeError):
        wrong = re.match(r"Could not override field '(\w+)'.*?\. (.*?) is of ", text, re.DOTALL)
        kinds = {
            type(value) for name, value in _all_options().items() if wrong and name.split(".")[-1] == wrong[1]
        }
        if wrong and kinds:
            expected = " or ".join(sorted(IN_WORDS[kind] for kind in kinds))
            return f"{wrong[1]}={shown(wrong[2])}: expected {expected}"
        if wrong:
            return f"{wrong[1]} is a section of options: set those in it, or call its update(…)"
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {shown(error.msg, 150)}"
    kind, line = type(error).__name__, first_line(error, 150)
    return (kind if line == kind else f"{kind}: {line}") + _nearest(error)


def _nearest(error: BaseException) -> str:
    """Names like the one that an error says is not there."""
    if not (isinstance(error, (NameError, AttributeError, ImportError)) and error.name):
        return ""
    name = error.name
    if isinstance(error, ModuleNotFoundError):
        return "; recipes are imported as `from configs import base`"
    if isinstance(error, ImportError):
        found = sorted(file.stem for file in RECIPES.glob("*.py") if file.stem != "__init__")
        name = (re.findall(r"cannot import name '(\w+)'", str(error)) or [name])[0]
    elif isinstance(error, NameError):
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        found = [*frame.f_locals, *frame.f_globals, *dir(builtins)]
    else:
        found = dir(error.obj)
    return f"; nearest: {shown(known(name, found, how_many=3), 150)}"


def check_known_options(config: ConfigDict, path: str) -> None:
    """Every option of the method and of all methods is there, in the type of its default, and no other.

    Raises:
      UserError: the first that is not; `path` is what the message calls the configuration.
    """
    found = leaves(config)
    method = found.get("method.name", next(iter(METHODS)))
    if not isinstance(method, str) or method not in METHODS:
        raise UserError(
            f"--config={path}: method.name={shown(repr(method))} is unknown; known: {', '.join(METHODS)}; "
            "start with `config = base.get_config(METHOD)`"
        )
    wanted = leaves(defaults(method))
    for name in found:
        if name not in wanted:
            raise UserError(
                f"--config={path}: there is no option {shown(repr(name))}; nearest: "
                f"{known(name, wanted, how_many=3)}"
            )
    for name, default in wanted.items():
        if name not in found:
            raise UserError(f"--config={path}: {name} is missing; start with `config = base.get_config()`")
        value = _as(type(default), found[name])
        if value is None:
            raise UserError(
                f"--config={path}: {name}={shown(found[name])}: expected {IN_WORDS[type(default)]}, such "
                f"as {default!r}"
            )
        if value is not found[name]:
            _section(config, name)[name.rpartition(".")[2]] = value


def _as(kind: type, value: Any) -> Any:
    """A value as what an option of type `kind` holds; None if it is something else."""
    if type(value) is kind:
        return value
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            return float(value)
    return None


def _section(config: ConfigDict, name: str) -> ConfigDict:
    """The section that holds the option of that full name."""
    for section in name.split(".")[:-1]:
        config = config[section]
    return config


def _apply(config: ConfigDict, override: str) -> None:
    flag, separator, text = override.partition("=")
    options = leaves(config)
    name = flag.removeprefix("--config.")
    if not flag.startswith("--config.") or name not in options:
        near = known(name, [f"--config.{n}" for n in options], how_many=3)
        raise UserError(f"unknown option {shown(flag)}; nearest: {near}")
    if not separator:
        raise UserError(f"{flag} needs a value: {flag}=VALUE")
    if name == "method.name":
        raise UserError(
            f"{flag}: a method brings its own options, so a configuration file chooses it: it starts with "
            f"`config = base.get_config({shown(repr(text))})`"
        )
    _section(config, name)[name.rpartition(".")[2]] = _parse(flag, text, type(options[name]))


def _parse(flag: str, text: str, kind: type) -> bool | int | float | str:
    if kind is bool:
        choices = {"true": True, "1": True, "false": False, "0": False}
        if text.lower() not in choices:
            raise UserError(f"{flag}={shown(text)}: expected {IN_WORDS[kind]}")
        return choices[text.lower()]
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{flag}={shown(text)}: expected {IN_WORDS[kind]}") from None
