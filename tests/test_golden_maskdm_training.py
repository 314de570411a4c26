"""Parity of MaskDM's training with the authors' implementation: noise, losses, gradients, six updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from golden_case import GOLDEN, channels_last
from golden_maskdm import INFO, MaskDMCase, assert_close, maskdm_case, token_mask

from maskdit_jax.diffusion.ddpm import alphas_cumprod, diffuse
from maskdit_jax.methods.maskdm import MaskDM, MaskDMDraws, UViTNetwork
from maskdit_jax.methods.method import network_graph
from maskdit_jax.models.compute import Compute
from maskdit_jax.training.optimizer import make_optimizer

COMPUTE = Compute(precision="float32", unroll="none")
NAMES = [pytest.param("uncond", marks=pytest.mark.slow), "cond"]


class TrainingCase:
    """A training step: its method, draws and weights, its settings and golden arrays."""

    def __init__(self, name: str):
        self.arrays, self.info = dict(np.load(GOLDEN / f"maskdm_loss_{name}.npz")), INFO[f"loss_{name}"]
        self.weights: MaskDMCase = maskdm_case(name)
        assert self.weights.info["config"] == self.info["model_config"]
        network = UViTNetwork(size="custom", **vars(self.weights.network))
        self.method = MaskDM(
            network=network,
            noise_schedule=self.info["schedule"],
            timesteps=self.info["timesteps"],
            mask_type="patch",
            mask_ratio=0.5,
        )
        self.graphdef = network_graph(self.method, self.weights.data, COMPUTE)

    @functools.cached_property
    def draws(self) -> MaskDMDraws:
        """Of the golden's images, mapped to -1 … 1."""
        clean, noise = (jnp.asarray(channels_last(self.arrays[name])) for name in ("img", "noise"))
        t = jnp.asarray(self.arrays["t"], jnp.int32)
        alpha_bar = alphas_cumprod(self.method.noise_schedule, self.method.timesteps)
        labels = jnp.asarray(self.arrays.get("y", np.full(len(t), -1)), jnp.int32)
        mask = token_mask(self.arrays["mask"], self.weights.num_patches)
        return MaskDMDraws(diffuse(2 * clean - 1, noise, t, alpha_bar), noise, t, labels, mask)

    @functools.cached_property
    def value_and_grad(self):
        def loss(params, draws):
            return self.method.loss(nnx.merge(self.graphdef, params), draws)[0].mean()

        return jax.jit(jax.value_and_grad(loss))

    def to_torch(self, params: dict) -> dict:
        return self.weights.to_torch(jax.device_get(params))


@functools.cache
def training_case(name: str) -> TrainingCase:
    return TrainingCase(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_noisy_images_and_losses(name):
    """With half of the patches hidden, and with none."""
    case = training_case(name)
    assert_close(case.draws.noisy, channels_last(case.arrays["x_t"]), 1e-6)
    assert case.method.num_keep(case.weights.data, 0, 1) == case.draws.mask.keep_ids.shape[1]

    @jax.jit
    def run(params, draws):
        network = nnx.merge(case.graphdef, params)
        return [case.method.loss(network, d) for d in (draws, draws._replace(mask=None))]

    (masked, terms), (whole, _) = run(case.weights.params, case.draws)
    assert masked.shape == whole.shape == (3,)
    np.testing.assert_array_equal(terms["denoise_loss"], masked)
    np.testing.assert_allclose(masked.mean(), case.arrays["loss_masked"], rtol=1e-6)
    np.testing.assert_allclose(whole.mean(), case.arrays["loss_nomask"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_every_parameter(name):
    """The norm of each, together too, and three value by value."""
    case = training_case(name)
    gradient = case.to_torch(case.value_and_grad(case.weights.params, case.draws)[1])
    expected = case.info["grad_norms"]
    assert set(gradient) == set(expected)
    norms = {key: float(np.linalg.norm(value)) for key, value in gradient.items()}
    for key, norm in expected.items():
        # None: the authors' parameter has no gradient, ours 0, for "no class" where all have one.
        np.testing.assert_allclose(norms[key], norm or 0, rtol=1e-4, atol=1e-9, err_msg=key)
    total = np.linalg.norm(list(norms.values()))
    np.testing.assert_allclose(total, case.arrays["grad_global_norm"], rtol=1e-5)
    for name in case.arrays:
        if name.startswith("grad/"):
            assert_close(gradient[name.removeprefix("grad/")], case.arrays[name], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_six_adamw_steps(name):
    """Loss, gradient norm and one weight's norm in each, three weights at the end."""
    case = training_case(name)
    info, arrays = case.info, case.arrays
    optimizer = make_optimizer(
        lambda count: jnp.asarray(arrays["opt_lr"], jnp.float32)[count],
        b1=info["betas"][0],
        b2=info["betas"][1],
        eps=info["eps"],
        weight_decay=info["weight_decay"],
        clip_norm=info["clip_grad"] or 0,
    )
    params, opt_state, seen = case.weights.params, optimizer.init(case.weights.params), []

    @jax.jit
    def update(gradient, opt_state, params):
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in arrays["opt_lr"]:
        loss, gradient = case.value_and_grad(params, case.draws)
        params, opt_state = update(gradient, opt_state, params)
        weight = case.to_torch(params)["encoder.mid_block.mlp.fc1.weight"]
        seen.append((loss, optax.tree.norm(gradient), np.linalg.norm(weight)))
    losses, norms, weight_norms = np.array(seen).T
    np.testing.assert_allclose(losses, arrays["opt_loss"], rtol=1e-5)
    np.testing.assert_allclose(norms, arrays["opt_grad_norm_before_clip"], rtol=1e-4)
    np.testing.assert_allclose(weight_norms, arrays["opt_mid_fc1_weight_norm"], rtol=1e-5)
    tensors = case.to_torch(params)
    for name in arrays:
        if name.startswith("after6/"):
            assert_close(tensors[name.removeprefix("after6/")], arrays[name], 5e-6)
