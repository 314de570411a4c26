"""Configurations saved with weights: those of older layouts mean what they meant, and none is believed."""

import copy
import json

import jax
import pytest
from tiny import ROOT

from maskdit_jax.config import (
    ConfigDict,
    Evaluation,
    compute_of,
    evaluation_of,
    leaves,
    method_of,
    resolve,
    shape_of,
)
from maskdit_jax.config_file import load
from maskdit_jax.errors import UserError
from maskdit_jax.methods.maskdit import MaskDiT, MaskDiTNetwork
from maskdit_jax.methods.method import Shape
from maskdit_jax.models.compute import Compute
from maskdit_jax.saved_config import COMPUTE_LATER, LATER, saved_config
from maskdit_jax.training.build import build
from maskdit_jax.training.init_from import check_same_network

# What a run of configs/digits.py saved before there were methods, as it was read from its checkpoint.
RUN = json.loads((ROOT / "tests/config_before_methods.json").read_text())
OF_IMPORTS = {"model": None, "diffusion": ("sigma_data", "mae_coef"), "data": ("space", "latent_scale")}
OF_IMPORTS |= {"sampling": None}


def old_run(**changes) -> dict:
    """That configuration, with other values by full name, such as model__depth."""
    content = copy.deepcopy(RUN)
    for name, value in changes.items():
        section, _, option = name.partition("__")
        content[section][option] = value
    return content


def old_import(**changes) -> dict:
    """What of it an import held."""
    content = old_run(**changes)
    return {s: {n: content[s][n] for n in names or content[s]} for s, names in OF_IMPORTS.items()}


def new_run() -> dict:
    config = resolve(load(str(ROOT / "configs/digits.py")), device_count=1)
    return json.loads(json.dumps(config.to_dict()))


def test_run_of_the_old_layout_is_what_its_recipe_says_today():
    """All of it, so that the run can go on."""
    upgraded = saved_config(RUN)
    wanted = leaves(resolve(load(str(ROOT / "configs/digits.py")), device_count=1))
    found = leaves(upgraded)
    kept_since = {"checkpoint.keep_every_steps": 1_000}  # which steps are kept does not change the run
    assert found | kept_since == {name: wanted[name] for name in found}
    # What there was not has the default that says nothing, and is asked of no saved configuration.
    of_evaluation = "every_steps during_samples features inception reference keep_best"
    later = {"init_weights", "init_step", "data.max_unreadable", "report.wandb"}
    assert set(wanted) - set(found) == later | {f"evaluation.{name}" for name in of_evaluation.split()}
    assert evaluation_of(upgraded) == Evaluation(num_samples=1_437)


def test_upgrading_changes_no_content_and_happens_once():
    content = old_run()
    upgraded = saved_config(content)
    assert content == RUN
    assert saved_config(upgraded.to_dict()).to_dict() == upgraded.to_dict()


def test_run_from_before_an_option_of_sampler_or_compute_has_its_default():
    older = new_run()
    for name in LATER:
        del older["sampling"][name]
    for name in COMPUTE_LATER:
        del older["compute"][name]
    assert saved_config(older).to_dict() == saved_config(new_run()).to_dict()


def test_import_of_the_old_layout_means_the_same():
    config = saved_config(old_import(model__precision="bfloat16", sampling__cfg_scale=3.0))
    network = MaskDiTNetwork(
        size="custom",
        hidden_size=96,
        depth=4,
        num_heads=4,
        patch_size=2,
        decoder_hidden_size=48,
        decoder_depth=2,
        decoder_num_heads=4,
    )
    assert method_of(config) == MaskDiT(network=network, sigma_data=0.75)
    assert shape_of(config) == (8, 1, 10)
    assert compute_of(config) == Compute(precision="bfloat16", unroll="full")
    assert (config.data.space, config.data.latent_scale) == ("pixels", 0.18215)
    assert (config.sampling.num_steps, config.sampling.cfg_scale) == (18, 3.0)


@pytest.mark.parametrize(
    ("changes", "has_token"),
    [
        ({}, True),
        ({"diffusion__mae_coef": 0.0}, False),
        ({"diffusion__mae_coef": 0.0, "model__use_decoder": False}, False),
    ],
)
def test_mask_token_was_there_where_the_loss_had_a_weight(changes, has_token):
    config = saved_config(old_run(**changes))
    assert config.method.network.mask_token == has_token
    assert ("mask_token" in build(config).state_shapes.params) == has_token


def test_a_network_without_decoder_is_the_same_in_old_and_new_configurations():
    old = saved_config(old_run(diffusion__mae_coef=0.0, model__use_decoder=False))
    new = ConfigDict(new_run())
    new.method.mae_coef, new.method.network.use_decoder = 0.0, False  # and nothing said of its mask token
    check_same_network(old, new, "there", *Shape._fields)


@pytest.mark.parametrize("content", [RUN, old_import(), new_run()], ids=["run", "import", "today"])
def test_what_weights_need_must_be_there(content):
    """Each option of the sections that decide, and each such section."""
    sections = [s for s in content if s in (*OF_IMPORTS, "method", "compute")]
    for section in sections:
        names = {name.partition(".")[2] for name in leaves(content) if name.startswith(f"{section}.")}
        if section == "data":
            names &= {"space", "latent_scale", "image_size", "channels", "num_classes"}
        if section == "diffusion":
            names &= {"sigma_data", "mae_coef"}
        if section in ("sampling", "compute"):
            names -= {*LATER, *COMPUTE_LATER}
        assert names
        for name in names:
            damaged = copy.deepcopy(content)
            *parents, last = (section, *name.split("."))
            node = damaged
            for parent in parents:
                node = node[parent]
            del node[last]
            with pytest.raises(UserError, match=f"the configuration lacks .*{section}.{name}"):
                saved_config(damaged)


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"model__depth": "4"}, "method.network.depth=4: expected a whole number"),
        ({"model__depth": 10**9}, "method.network.depth=1000000000 must be at most 1,000"),
        ({"model__use_decoder": 1}, "method.network.use_decoder=1: expected true or false"),
        ({"model__num_heads": 5}, "method.network.num_heads=5 does not divide method.network.hidden_size=96"),
        ({"model__image_size": 0}, "data.image_size=0 must be at least 1"),
        ({"model__image_size": 9}, "method.network.patch_size=2 does not divide data.image_size=9"),
        ({"model__precision": "best"}, "compute.precision='best' is unknown"),
        ({"model__fast": True}, "the option method.network.fast is unknown"),
        ({"diffusion__sigma_data": 0}, "method.sigma_data=0 must be greater than 0"),
        ({"diffusion__mae_coef": "0.1"}, "the configuration cannot be used"),
        ({"data__space": "audio"}, "data.space='audio' is unknown"),
        ({"sampling__solver": "best"}, "sampling.solver='best'"),
        ({"sampling__num_steps": -1}, "sampling.num_steps=-1"),
        ({"training__ema_decay": 2.0}, "ema.decay=2.0 must be between 0 and 1"),
        ({"report__preview_rows": 0}, "report.preview_rows=0 must be at least 1"),
        ({"report__preview_rows": "10"}, "report.preview_rows='10': expected a whole number"),
        ({"evaluation__num_samples": 10**7}, "evaluation.num_samples=10000000 must be at most 1,000,000"),
        ({"training__num_steps": 2**70}, "training.num_steps is no 64-bit number"),
        ({"data__source": None}, "data.source=None"),
    ],
    ids=str,
)
def test_values_that_no_run_has_are_refused_by_name(changes, fragment):
    with pytest.raises(UserError) as refused:
        saved_config(old_run(**changes))
    assert fragment in str(refused.value)


@pytest.mark.parametrize(
    "content", [None, [], "x", {}, {"model": 3}, {"method": {}}, {"method": {"name": []}}]
)
def test_what_is_no_configuration_is_refused(content):
    with pytest.raises(UserError):
        saved_config(content)


def test_old_run_has_the_state_of_today():
    """The shapes of its parameters, so that its checkpoints can be read."""
    upgraded, today = saved_config(RUN), resolve(load(str(ROOT / "configs/digits.py")), device_count=1)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), build(c).state_shapes) for c in (upgraded, today)]
    assert shapes[0] == shapes[1]
