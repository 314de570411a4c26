"""Parity with the authors' implementation: outputs, tokens, losses, gradients, updates, EMA."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_case import COMPUTE, GOLDEN, Case, assert_close_to_rms
from tiny import ROOT, command_environment

from maskdit_jax.diffusion.edm import coefficients, loss_weight, precondition
from maskdit_jax.interop.maskdit import to_torch
from maskdit_jax.methods.maskdit import MASK_SCHEDULES, MaskDiT, MaskDiTNetwork, mask_ratio_at
from maskdit_jax.methods.method import Shape, init_params
from maskdit_jax.models.embed import noise_features, position_table
from maskdit_jax.models.masking import count_kept
from maskdit_jax.training.ema import update_ema
from maskdit_jax.training.optimizer import make_optimizer

SMALL = ["maskdit_s2_32"]
SMALL += [pytest.param(name, marks=pytest.mark.slow) for name in ("maskdit_b4_uncond", "dit_s2_nodecoder")]


@functools.cache
def case(name: str) -> Case:
    return Case(name)


@functools.cache
def losses(name: str) -> tuple[dict, dict, dict]:
    """Mean loss terms per sample with and without mask, and the gradient of the mean total loss."""
    c = case(name)

    @jax.jit
    def masked(params, draws):
        loss, terms = c.loss(params, draws)
        return loss.mean(), {"total": loss, **terms}

    value_and_grad = jax.jit(jax.value_and_grad(masked, has_aux=True))
    (_, terms), gradient = value_and_grad(c.params, c.draws)
    return terms, gradient, value_and_grad


def as_torch(name: str, params: dict) -> dict:
    return case(name).to_torch(jax.device_get(params))  # views from here on


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maskdit_s2_32", "maskdit_xl2_32", "maskdit_xl2_64"])
def test_published_layout_through_the_public_api(name):
    """Torch tensors → import → load → outputs, losses; of S/2 eight guided Heun steps too; see the script."""
    hasty = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    environment = {k: v for k, v in command_environment().items() if k not in hasty}
    script = [sys.executable, ROOT / "tests" / "golden_through_import.py", name]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", SMALL)
def test_outputs_and_losses(name):
    """Denoised images with and without mask, and each loss, from the golden weights."""
    c = case(name)

    @jax.jit
    def run(params, draws):
        denoise = precondition(nnx.merge(c.graphdef, params), sigma_data=0.5)
        masked = denoise(draws.noisy, draws.sigma, draws.labels, draws.mask)
        loss, terms = c.loss(params, draws)
        plain, plain_terms = c.loss(params, draws._replace(mask=None))
        evaluated = c.denoiser(params)(draws.noisy, draws.sigma, draws.labels)
        return {"eval_D": evaluated, "train_D": masked}, {
            "loss_denoise": terms["denoise_loss"],
            "loss_total": loss,
            "loss_nomask": plain,
            "plain_terms": plain_terms["denoise_loss"],
        } | ({"loss_mae": terms["mae_loss"]} if c.method.mae_coef else {})

    outputs, terms = run(c.params, c.draws)
    for key, value in outputs.items():
        assert_close_to_rms(value, c[key])
    for key in terms.keys() - {"plain_terms"}:
        np.testing.assert_allclose(terms[key], c[key], rtol=1e-4, err_msg=key)
    np.testing.assert_array_equal(terms["plain_terms"], terms["loss_nomask"])
    np.testing.assert_array_equal(c.draws.mask.hidden, c["mask"])
    np.testing.assert_array_equal(c.draws.mask.keep_ids, c["ids_keep"])
    np.testing.assert_array_equal(c.draws.mask.restore_ids, c["ids_restore"])


def test_preconditioning():
    c = case("maskdit_s2_32")
    sigma = jnp.asarray(c["sigma"])
    for name, value in zip(("c_skip", "c_out", "c_in", "c_noise"), coefficients(sigma, 0.5), strict=True):
        np.testing.assert_allclose(value, c[name], rtol=1e-5, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(loss_weight(sigma, 0.5), c["loss_weight"], rtol=1e-5)


def test_tokens_on_the_way():
    """Condition, embedded tokens, first block, encoder and bridge, each against its golden."""
    c = case("maskdit_s2_32")
    network, mask = nnx.merge(c.graphdef, c.params), c.draws.mask
    _, _, c_in, c_noise = coefficients(c.draws.sigma, 0.5)
    condition = network.condition(c_noise, c.draws.labels)
    assert_close_to_rms(noise_features(c_noise), c["t_freq"])
    assert_close_to_rms(network.noise_embedding(c_noise), c["t_emb"])
    assert_close_to_rms(network.label_embedding(c.draws.labels), c["y_emb"])
    assert_close_to_rms(condition, c["c"])

    tokens = network.embed(c_in[:, None, None, None] * c.draws.noisy, mask)
    assert_close_to_rms(tokens, c["train_tokens_in"])
    assert_close_to_rms(network.encoder(tokens, condition, stop=1), c["train_block0_out"])
    tokens = network.encoder(tokens, condition)
    assert_close_to_rms(tokens, c["train_enc_tokens"])
    assert_close_to_rms(network.bridge(tokens, condition), c["train_dec_layer_out"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_gradient_of_every_parameter(name):
    """Norms of all gradients, and the stored ones value by value."""
    c = case(name)
    gradient = as_torch(name, losses(name)[1])
    keys = {k for k in gradient if not k.endswith("pos_embed")}
    assert keys == set(c["grad_norm_keys"])
    for key, norm in zip(c["grad_norm_keys"], c["grad_norms"], strict=True):
        np.testing.assert_allclose(np.linalg.norm(gradient[key]), norm, rtol=1e-3, atol=1e-9, err_msg=key)
    for name in c.arrays:
        if name.startswith("grad__"):
            assert_close_to_rms(gradient[name.removeprefix("grad__")], c[name], 1e-4)


@pytest.mark.slow
def test_two_adamw_steps_and_the_ema():
    """Parameters after one and two updates, the EMA after one, the loss before each and after."""
    c = case("maskdit_s2_32")
    value_and_grad = losses("maskdit_s2_32")[2]
    optimizer = make_optimizer(lambda _: 1e-4, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0, clip_norm=0)
    params, opt_state, seen = c.params, optimizer.init(c.params), []

    @jax.jit
    def update(gradient, opt_state, params):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for step in (1, 2):
        (loss, _), gradient = value_and_grad(params, c.draws)
        params, opt_state = update(gradient, opt_state, params)
        seen.append(loss)
        tensors = as_torch("maskdit_s2_32", params)
        for name in c.arrays:
            if name.startswith(f"adamw{step}__"):
                np.testing.assert_allclose(tensors[name.split("__")[1]], c[name], rtol=0, atol=1e-5)
        if step == 1:
            for decay, prefix, atol in ((0.9, "ema1_decay0.9__", 2e-6), (0.9999, "ema1__", 2e-7)):
                ema = as_torch("maskdit_s2_32", update_ema(c.params, params, decay))
                for name in c.arrays:
                    if name.startswith(prefix):
                        np.testing.assert_allclose(ema[name.split("__")[1]], c[name], rtol=0, atol=atol)
    seen.append(value_and_grad(params, c.draws)[0][0])
    np.testing.assert_allclose(seen, c["step_loss_mean"], rtol=1e-4)


def test_position_tables():
    golden = np.load(GOLDEN / "pos_embed.npz")
    for name in golden.files:
        if name == "config_json" or name.endswith("_rows"):
            continue
        width, grid = (int(part[1:]) for part in name.split("_")[:2])
        table = position_table(width, grid)
        if name.endswith("_values"):
            table = table[golden[name.replace("_values", "_rows")]]
        np.testing.assert_allclose(table, golden[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_mask_ratio_schedules_and_kept_counts():
    golden = np.load(GOLDEN / "mask_ratio_schedules.npz")
    for name in MASK_SCHEDULES:
        ratios = [mask_ratio_at(x, name, 0.5, 0.1) for x in golden["x"]]
        np.testing.assert_allclose(ratios, golden[name], rtol=1e-12, err_msg=name)
    for num_tokens, row in zip(golden["keep_lengths"], golden["keep_counts"], strict=True):
        assert [count_kept(int(num_tokens), r) for r in golden["keep_ratios"]] == row.tolist()


def _registry():
    return json.loads((GOLDEN / "registry.json").read_text())


COUNTED_FAST = ("DiT-S/2", "DiT-XL/2", "DiT-H/8")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in COUNTED_FAST else pytest.mark.slow) for n in _registry()["models"]],
)
def test_parameter_count_of_every_size(name):
    """Counts with and without the fixed tables and the decoder; for two sizes all names and shapes."""
    registry = _registry()
    data = Shape(32, 4, 1000)

    def tensors(**options):
        network = MaskDiTNetwork(size=name.removeprefix("DiT-"), **options)
        params = init_params(MaskDiT(network=network), data, COMPUTE, 0)
        return params, to_torch(params, network, data)

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    expected = registry["models"][name]
    params, torch_tensors = jax.eval_shape(tensors)
    assert count(params) == expected["trainable"]
    assert count(torch_tensors) == expected["total"]
    without = jax.eval_shape(lambda: tensors(use_decoder=False))[1]
    assert count(without) == expected["total_without_decoder"]
    if name in registry["state_dict"]:
        shapes = {key: list(x.shape) for key, x in torch_tensors.items()}
        assert shapes == dict(registry["state_dict"][name])


@pytest.mark.parametrize(
    ("option", "network", "num_classes"),
    [
        ("mae_loss_coef=0", {"mask_token": False}, 1000),
        ("num_classes=0", {}, 0),
        ("use_decoder=False", {"use_decoder": False}, 1000),
    ],
)
def test_options_remove_the_tensors_they_should(option, network, num_classes):
    registry = _registry()
    data, network = Shape(32, 4, num_classes), MaskDiTNetwork(size="S/2", **network)
    method = MaskDiT(network=network)
    keys = jax.eval_shape(lambda: to_torch(init_params(method, data, COMPUTE, 0), network, data))
    gone = {key for key, _ in registry["state_dict"]["DiT-S/2"]} - set(keys)
    removed = registry["option_keys"][option]["removed"]
    assert gone
    assert {any(k.startswith(r.rstrip("*")) for r in removed) for k in gone} == {True}
    assert all(any(k.startswith(r.rstrip("*")) for k in gone) for r in removed)
