"""Configurations: every file builds, every option has a reader, every mistake is one line."""

import ast
import contextlib
import dataclasses
import functools
import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import get_type_hints

import jax
import jax.numpy as jnp
import pytest

from maskdit_jax.config import (
    SECTIONS,
    ConfigDict,
    Run,
    compute_of,
    defaults,
    described,
    leaves,
    method_of,
    resolve,
    shape_of,
)
from maskdit_jax.config_file import load
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.errors import UserError
from maskdit_jax.methods import METHODS
from maskdit_jax.methods.method import Method, Shape
from maskdit_jax.options import each_option
from maskdit_jax.training.build import batch_shapes, build
from maskdit_jax.training.optimizer import make_optimizer

ROOT = Path(__file__).parents[1]
NAMES = sorted(file.stem for file in (ROOT / "configs").glob("*.py") if file.stem != "__init__")


def loaded(name: str, *overrides: str) -> ConfigDict:
    return load(str(ROOT / "configs" / f"{name}.py"), [f"--config.{override}" for override in overrides])


def resolved(name: str, *overrides: str) -> ConfigDict:
    """The configuration for the eight devices of the tests."""
    return resolve(loaded(name, *overrides), device_count=8)


OPTIONS = leaves(loaded("base"))
NUMBERS = [name for name, value in OPTIONS.items() if type(value) in (int, float)]


def fields_of(method: str) -> dict[str, dataclasses.Field]:
    """By its full name, the field that makes an option, of those that a configuration of the method has."""
    records = {"": Run, "method.": METHODS[method], "sampling.": SamplerOptions}
    records |= {f"{name}.": record for name, record in SECTIONS.items()}
    found = {n: f for prefix, record in records.items() for n, f, _ in each_option(record, prefix)}
    return {name: field for name, field in found.items() if name != "sampling.guidance_interval"}


FIELDS = fields_of("maskdit")
RANGES = {name: field.metadata["range"] for name, field in FIELDS.items()}
CHOICES = {name: allowed["choices"] for name, allowed in RANGES.items() if allowed["choices"]}


@contextlib.contextmanager
def user_error(*fragments: str):
    """The block raises a UserError of one line with every fragment; the list yielded then holds the line."""
    messages = []
    with pytest.raises(UserError) as caught:
        yield messages
    messages.append(str(caught.value))
    assert "\n" not in messages[0]
    for fragment in fragments:
        assert fragment in messages[0]


# The files

BUILT_FAST = ("digits_maskdm_pretrain", "in256")


@pytest.mark.parametrize(
    "name",  # the others differ from these in numbers only
    [pytest.param(name, marks=() if name in BUILT_FAST else pytest.mark.slow) for name in NAMES],
)
def test_every_file_builds_state_and_step_without_allocating(name):
    """An update of the state's shapes gives the same shapes and scalar metrics; XL/2 at its full size."""
    config = resolved(name)
    held = sum(array.nbytes for array in jax.live_arrays())
    training = build(config)
    shapes = batch_shapes(config, training.mesh, config.training.batch_size)
    for num_keep in {training.num_keep(0), training.num_keep(config.training.num_steps - 1)}:

        def step(state, batch, num_keep=num_keep):
            return training.step(state, batch, num_keep)

        state, metrics = jax.eval_shape(step, training.state_shapes, shapes)
        described = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, training.state_shapes)]
        assert described[0] == described[1]
        terms = {"denoise_loss"} if config.method.name == "maskdit" else set()
        assert {"loss", "grad_norm"} | terms <= set(metrics)
        assert {metric.shape for metric in metrics.values()} == {()}
    assert sum(array.nbytes for array in jax.live_arrays()) - held < 1e6


@pytest.mark.parametrize("name", [name for name in NAMES if name != "base"])
def test_every_recipe_names_its_data(name):
    assert loaded(name).data.source


def test_size_fills_in_what_is_0():
    network = resolved("base", "method.network.size=B/4", "method.network.depth=3").method.network
    numbers = (network.depth, network.hidden_size, network.num_heads, network.patch_size)
    assert numbers == (3, 768, 12, 4)


def test_mesh_data_0_takes_the_devices_that_fsdp_leaves():
    assert resolved("base", "mesh.fsdp=2").mesh.data == 4


def test_resolving_leaves_the_configuration_as_it_was():
    config = loaded("base")
    resolve(config, device_count=8)
    assert leaves(config) == OPTIONS


# Published recipes: MaskDiT, section 4 and tables 1 and 2


IN_ALL = {
    "method.network.size": "XL/2",
    "method.name": "maskdit",
    "data.channels": 4,
    "data.num_classes": 1000,
    "method.network.use_decoder": True,
    "method.network.mask_token": True,
    "method.network.decoder_hidden_size": 512,
    "method.network.decoder_depth": 8,
    "method.network.decoder_num_heads": 16,
    "method.sigma_data": 0.5,
    "method.P_mean": -1.2,
    "method.P_std": 1.2,
    "method.mae_coef": 0.1,
    "method.label_dropout": 0.1,
    "method.mask_ratio_min": 0,
    "data.space": "latents",
    "data.latent_scale": 0.18215,
    "training.batch_size": 1024,
    "ema.decay": 0.9999,
    "ema.rule": "constant",
    "optimizer.warmup_kimg": 0,
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.999,
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0,
    "optimizer.clip_norm": 0,
    "sampling.num_steps": 40,
    "sampling.solver": "heun",
    "sampling.cfg_scale": 1.5,
    "sampling.sigma_min": 0.002,
    "sampling.sigma_max": 80,
    "sampling.rho": 7,
    "sampling.S_churn": 0,
}
COLUMNS = """
    data.image_size training.num_steps optimizer.learning_rate
    method.mask_ratio method.mask_schedule
""".split()
# Last: the dtype of compute, and the share of the patches that is visible at the first and the last step.
RECIPES = {
    "in256": ((32, 2_000_000, 1e-4, 0.5, "constant"), jnp.bfloat16, (0.5, 0.5)),
    "in256_tune": ((32, 75_000, 5e-5, 0.0, "constant"), jnp.float32, (1, 1)),
    # The published weights are the third checkpoint, of 8, of a schedule over 100k steps: ratio 0.24.
    "in256_tune_cos": ((32, 37_500, 5e-5, 0.5, "cosine4"), jnp.float32, (0.5, 194 / 256)),
    "in512": ((64, 1_000_000, 1e-4, 0.5, "constant"), jnp.bfloat16, (0.5, 0.5)),
    "in512_tune": ((64, 50_000, 5e-5, 0.0, "constant"), jnp.float32, (1, 1)),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_the_published_one(name):
    values, dtype, visible = RECIPES[name]
    config = resolved(name)
    assert leaves(config) == leaves(config) | IN_ALL | dict(zip(COLUMNS, values, strict=True))
    assert compute_of(config).dtype == dtype

    training, num_tokens = build(config), (config.data.image_size // 2) ** 2
    first_and_last = training.num_keep(0), training.num_keep(config.training.num_steps - 1)
    assert tuple(num_keep / num_tokens for num_keep in first_and_last) == visible


# Every option has words, a range and a reader


def test_options_of_a_configuration_are_those_of_the_records():
    """With their defaults: what is listed, checked and saved is one and the same."""
    for method in METHODS:
        options, fields = leaves(defaults(method)), fields_of(method)
        assert set(options) == {*fields, "method.name"}
        own = METHODS[method].sampler
        for name, field in fields.items():
            section, _, last = name.rpartition(".")
            default = getattr(own, last) if section == "sampling" else field.default
            assert options[name] == default and type(options[name]) is type(field.default), name


@pytest.mark.parametrize("method", METHODS)
def test_every_option_has_words(method):
    """And `--list_options` has a line for each, with its value and its words."""
    fields, lines = fields_of(method), described(defaults(method))
    assert {name for name, field in fields.items() if not field.metadata.get("help")} == set()
    listed = {line.partition("=")[0]: line for line in lines}
    assert set(listed) == {f"--config.{name}" for name in fields}
    assert all(f.metadata["help"] in listed[f"--config.{name}"] for name, f in fields.items())


# The numbers that may be any, and why.
WITHOUT_RANGE = {"method.P_mean": "the mean of a logarithm"}


@pytest.mark.parametrize("method", METHODS)
def test_every_number_has_a_lower_bound(method):
    """An upper bound of whole numbers is always there: the counters of the training state."""
    options = leaves(defaults(method))
    ranges = {name: field.metadata["range"] for name, field in fields_of(method).items()}
    assert all({"at_least", "above", "at_most", "choices"} == set(allowed) for allowed in ranges.values())
    numbers = [name for name in ranges if type(options[name]) in (int, float)]
    unbounded = {n for n in numbers if ranges[n]["at_least"] is None and ranges[n]["above"] is None}
    assert unbounded <= set(WITHOUT_RANGE)


@functools.cache
def attributes_read() -> set[str]:
    """Every `a.b.c` that the package reads; config.py, which only checks the options, apart."""
    found = set()
    for file in (ROOT / "maskdit_jax").rglob("*.py"):
        if file.name != "config.py":
            nodes = ast.walk(ast.parse(file.read_text()))
            found |= {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    return found


# Sections that are handed over whole, as records or as keyword arguments of their readers.
PASSED_ON = ("method", "optimizer", "sampling")


@pytest.mark.parametrize("name", [name for name in OPTIONS if name.partition(".")[0] not in PASSED_ON])
def test_option_has_a_reader(name):
    """Its full name stands in the package: `training.num_steps`, `config.seed`."""
    wanted = name if "." in name else f"config.{name}"
    assert any(f".{read}".endswith(f".{wanted}") for read in attributes_read())


def test_options_of_a_section_passed_on_are_its_readers_arguments():
    """`build` takes two of the optimizer out and makes the schedule of them."""
    base = loaded("base")
    schedule = {"learning_rate", "warmup_kimg"}
    adamw = set(inspect.signature(make_optimizer).parameters) - {"learning_rate"}
    sampler = {field.name for field in dataclasses.fields(SamplerOptions)} - {"guidance_interval"}
    assert set(base.optimizer) - schedule == adamw
    assert set(base.sampling) == sampler
    source = (ROOT / "maskdit_jax" / "training" / "build.py").read_text()
    assert all(f'adamw.pop("{name}")' in source for name in schedule)


def read_of_self(record: type, apart: tuple[str, ...] = ()) -> set[str]:
    """Every `self.a` that the methods of a class read, but for some of its methods."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    functions = [x for x in body.body if isinstance(x, ast.FunctionDef) and x.name not in apart]
    nodes = [node for function in functions for node in ast.walk(function)]
    return {ast.unparse(x).removeprefix("self.") for x in nodes if isinstance(x, ast.Attribute)}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_options_of_a_method_are_read_by_it_or_are_arguments_of_its_network(method):
    """`check` does not count; `size` is a name for other numbers."""
    own = {field.name for field in dataclasses.fields(method)} - {"network"}
    assert own <= read_of_self(method, apart=("check",))
    network = {field.name for field in dataclasses.fields(get_type_hints(method)["network"])} - {"size"}
    built = get_type_hints(method.build)["return"]
    arguments = set(inspect.signature(built.__init__).parameters) - {"self", "compute", "rngs"}
    assert arguments == network | set(Shape._fields)


def test_every_option_that_is_read_exists():
    """`config.section.option` in the package is an option of configs/base.py, or a section of options."""
    chains = [re.search(r"\bconfig\.(\w+)\.(\w+)$", read) for read in attributes_read()]
    read = {chain.groups() for chain in chains if chain}
    options = {(section, option) for section, option in read if not hasattr(ConfigDict, option)}
    assert len(options) > 20
    sections = {name.rpartition(".")[0] for name in OPTIONS}
    assert {f"{section}.{option}" for section, option in options} <= set(OPTIONS) | sections


@pytest.mark.parametrize("method", METHODS)
def test_records_of_a_configuration_hold_its_values(method):
    config = resolve(defaults(method), device_count=8)
    assert isinstance(method_of(config), Method) and type(method_of(config)) is METHODS[method]
    assert dataclasses.asdict(method_of(config)) | {"name": method} == config.method.to_dict()
    assert shape_of(config) == (32, 4, 1000)
    assert dataclasses.asdict(compute_of(config)) == config.compute.to_dict()


# Overrides


@pytest.mark.parametrize(
    "override, value",
    [
        ("report.tensorboard=false", False),
        ("report.tensorboard=True", True),
        ("report.tensorboard=0", False),
        ("training.num_steps=7", 7),
        ("optimizer.learning_rate=3", 3.0),
        ("optimizer.learning_rate=2.5e-4", 2.5e-4),
        ("method.P_mean=-0.4", -0.4),
        ("method.network.size=B/4", "B/4"),
        ("data.source=latents:/data/a=b", "latents:/data/a=b"),
        ("seed=5", 5),
    ],
)
def test_override_sets_one_option_in_its_own_type(override, value):
    name = override.partition("=")[0]
    changed = leaves(loaded("base", override))
    assert changed == OPTIONS | {name: value}
    assert type(changed[name]) is type(OPTIONS[name]) is type(value)


def test_last_override_counts():
    assert loaded("base", "seed=5", "seed=6").seed == 6


# Mistakes


@pytest.mark.parametrize(
    "override, fragments",
    [
        ("training.batchsize=8", ["--config.training.batchsize", "nearest: --config.training.batch_size"]),
        ("steps=8", ["--config.steps", ".num_steps"]),
        ("training=8", ["--config.training", "nearest: --config.training."]),
        ("training.num_steps", ["--config.training.num_steps", "--config.training.num_steps=VALUE"]),
        ("training.num_steps=", ["--config.training.num_steps", "a whole number"]),
        ("training.num_steps=1.5", ["--config.training.num_steps=1.5", "a whole number"]),
        ("optimizer.learning_rate=fast", ["--config.optimizer.learning_rate=fast", "a number"]),
        ("report.tensorboard=maybe", ["--config.report.tensorboard=maybe", "true or false"]),
        ("method.network.size=XXL/2", ["method.network.size='XXL/2'", "XL, H", "custom"]),
        ("method.network.size=XL/3", ["method.network.size='XL/3'", "/2, /4 or /8"]),
        ("method.network.size=XL", ["method.network.size='XL'", "/2, /4 or /8"]),
        ("method.network.patch_size=3", ["method.network.patch_size=3", "data.image_size=8"]),
        ("method.network.num_heads=192", ["method.network.num_heads=192", "method.network.hidden_size=96"]),
        ("method.network.num_heads=5", ["method.network.num_heads=5", "method.network.hidden_size=96"]),
        (
            "method.network.decoder_num_heads=5",
            ["method.network.decoder_num_heads=5", "method.network.decoder_hidden_size=48"],
        ),
        ("method.network.use_decoder=false", ["method.mae_coef=0.1", "method.network.use_decoder=false"]),
        ("model.depth=3", ["--config.model.depth", "nearest: ", "--config.method.network.depth"]),
        ("method.name=maskdit", ["--config.method.name", "base.get_config('maskdit')"]),
        ("ema.rule=best", ["ema.rule='best'", "constant, warmup"]),
        ("mesh.data=4", ["mesh.data=4", "8"]),
        ("mesh.fsdp=3", ["mesh.fsdp=3", "8"]),
        ("mesh.fsdp=16", ["mesh.fsdp=16", "8"]),
        ("sampling.sigma_min=80", ["sampling.sigma_min=80.0", "sigma_max=80.0"]),
        ("seed=4294967296", ["seed=4294967296", "4,294,967,295"]),
        ("seed=18446744073709551616", ["seed=18446744073709551616", "4,294,967,295"]),
        ("method.network.hidden_size=1000000000", ["method.network.hidden_size=1000000000", "65,536"]),
        ("data.num_classes=3000000000", ["data.num_classes=3000000000", "10,000,000"]),
        ("data.image_size=1024", ["data.image_size=1024", "262,144 tokens", "65,536"]),
        ("training.num_steps=3000000000", ["training.num_steps=3000000000", "2,147,483,647"]),
        ("report.preview_columns=1000000000000", ["report.preview_columns=1000000000000"]),
        ("report.preview_columns=10000", ["report.preview_columns=10000", "100,000 images"]),
        ("sampling.num_steps=1000000000000", ["sampling.num_steps=1000000000000", "at most 10,000"]),
        ("sampling.rho=1e-30", ["sampling.rho=1e-30", "7"]),
        ("sampling.rho=1e30", ["sampling.rho=1e+30", "do not fall"]),
        ("sampling.sigma_max=nan", ["sampling.sigma_max=nan"]),
        ("sampling.solver=best", ["sampling.solver='best'", "heun, euler"]),
        ("optimizer.eps=1e999", ["optimizer.eps=inf", "finite"]),
        (
            "method.network.patch_size=1",
            ["method.mae_coef=0.1", "method.network.patch_size=1", "data.channels=1"],
        ),
        ("data.image_size=128", ["evaluation.features='pixels'", "16,384 values", "features=inception"]),
        (
            "evaluation.features=inception",
            ["evaluation.features='inception' needs evaluation.inception=FILE"],
        ),
        ("evaluation.keep_best=true", ["evaluation.keep_best=True", "evaluation.every_steps=0"]),
        ("evaluation.num_samples=1", ["evaluation.num_samples=1 has no covariance"]),
    ],
)
def test_mistake_is_one_line_naming_the_option(override, fragments):
    with user_error(*fragments):
        resolved("digits", override)


@pytest.mark.parametrize("name", CHOICES)
def test_unknown_choice_lists_the_known_ones(name):
    with user_error(f"{name}='best'", *CHOICES[name]):
        resolved("digits", f"{name}=best")


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - {"method.P_mean"}))
def test_negative_number_is_an_error(name):
    """A mean of logarithms is the only number that may be negative."""
    with user_error(f"{name}=-1"):
        resolved("digits", f"{name}=-1")


MAY_BE_0 = """
    seed data.num_classes data.max_unreadable method.P_mean method.mae_coef method.label_dropout
    method.mask_ratio method.mask_ratio_min method.mask_schedule_steps ema.decay
    optimizer.warmup_kimg optimizer.b1 optimizer.b2 optimizer.weight_decay optimizer.clip_norm mesh.data
    checkpoint.keep_every_steps report.preview_steps
    sampling.cfg_scale sampling.cfg_growth sampling.guided_channels sampling.eta
    sampling.S_churn sampling.S_min sampling.S_max sampling.S_noise
    evaluation.num_samples evaluation.every_steps init_step
""".split()


@pytest.mark.parametrize("name", sorted(set(NUMBERS) - set(MAY_BE_0)))
def test_zero_is_an_error_where_it_means_nothing(name):
    with user_error(f"{name}=0"):
        resolved("digits", f"{name}=0")


@pytest.mark.parametrize("name", MAY_BE_0)
def test_zero_is_accepted_where_it_means_something(name):
    assert leaves(loaded("digits", f"{name}=0"))[name] == 0
    resolved("digits", f"{name}=0")


@pytest.mark.parametrize(
    "name",
    """method.label_dropout method.mask_ratio method.mask_ratio_min ema.decay
    optimizer.b1 optimizer.b2 sampling.eta""".split(),
)
def test_share_above_1_is_an_error(name):
    with user_error(f"{name}=1.5"):
        resolved("digits", f"{name}=1.5")


@pytest.mark.parametrize(
    "batch_size, accumulate, proposed",
    [(100, 1, ["96", "104"]), (100, 4, ["96", "128"]), (5, 1, ["8"])],
)
def test_batch_that_does_not_divide_comes_with_ones_that_do(batch_size, accumulate, proposed):
    microbatches = f"training.accumulate={accumulate}"
    with user_error(f"training.batch_size={batch_size}", f"8 devices × {accumulate} microbatches") as message:
        resolved("digits", microbatches, f"training.batch_size={batch_size}")
    assert re.findall(r"\d+", message[0].partition("; try ")[2]) == proposed
    for number in proposed:
        resolved("digits", microbatches, f"training.batch_size={number}")


@pytest.mark.parametrize("image_size, tokens", [(6, 9), (8, 16), (32, 256), (64, 1024)])
@pytest.mark.parametrize("name", ["mask_ratio", "mask_ratio_min"])
def test_mask_that_hides_everything_comes_with_a_ratio_that_does_not(name, image_size, tokens):
    """Either end of a schedule counts."""
    size, schedule = f"data.image_size={image_size}", "method.mask_schedule=linear"
    with user_error(f"method.{name}=1.0", f"all {tokens} patches") as message:
        resolved("digits", size, schedule, f"method.{name}=1")
    proposed = message[0].partition("at most ")[2]
    resolved("digits", size, schedule, f"method.{name}={proposed}")


# Without ml_collections


@pytest.mark.processes
def test_without_ml_collections_every_file_resolves_to_the_same_values():
    script = f"""
import json, sys
sys.modules["ml_collections"] = None
from maskdit_jax.config import resolve
from maskdit_jax.config_file import load
override = ["--config.training.num_steps=7"]
configs = {{n: load(f"configs/{{n}}.py", override) for n in {NAMES}}}
resolved = {{n: resolve(c, device_count=8) for n, c in configs.items()}}
print(json.dumps({{n: [configs[n].to_dict(), resolved[n].to_dict()] for n in configs}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    without = json.loads(done.stdout)
    for name in NAMES:
        override = "training.num_steps=7"
        assert without[name] == [loaded(name, override).to_dict(), resolved(name, override).to_dict()]
