"""The torch twin's training step does what ours does: same draws, same losses, gradient, update, EMA."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from tiny import tiny_config

from maskdit_jax.benchmark.against_torch import torch_options
from maskdit_jax.benchmark.step import synthetic_batch
from maskdit_jax.benchmark.torch_maskdit import Mask
from maskdit_jax.benchmark.torch_step import Draws, TorchTraining
from maskdit_jax.config import compute_of, method_of, shape_of
from maskdit_jax.errors import UserError
from maskdit_jax.interop.maskdit import to_torch
from maskdit_jax.methods.method import network_graph
from maskdit_jax.training.build import build

# Nothing starts at zero here, so that every weight has a gradient; dropped labels are among the draws.
OPTIONS = {"ema.decay": 0.9, "optimizer.warmup_kimg": 0, "method.label_dropout": 0.3}


def to_torch_draws(draws):
    def nchw(x):
        return torch.from_numpy(np.asarray(x)).permute(0, 3, 1, 2).contiguous()

    def ids(x):
        return torch.from_numpy(np.asarray(x)).long()

    labels = (np.asarray(draws.labels)[:, None] == np.arange(10)).astype(np.float32)
    mask = draws.mask and Mask(ids(draws.mask.keep_ids), ids(draws.mask.restore_ids))
    sigma = torch.from_numpy(np.asarray(draws.sigma))
    return Draws(nchw(draws.clean), nchw(draws.noisy), sigma, torch.from_numpy(labels), mask)


@pytest.mark.slow
@pytest.mark.parametrize("mask_ratio", [0.5, 0.0])
def test_same_draws_give_the_same_step(mask_ratio):
    config = tiny_config(OPTIONS | {"method.mask_ratio": mask_ratio}, devices=1)
    method, data, training = method_of(config), shape_of(config), build(config)
    num_keep, rng = training.num_keep(0), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), training.state_shapes.params
    )
    batch = synthetic_batch(config, training)
    twin = TorchTraining(torch_options(config))

    def as_torch(tree):
        return {
            name: torch.from_numpy(np.array(x)) for name, x in to_torch(tree, method.network, data).items()
        }

    twin.denoiser.load_state_dict(as_torch(params))
    twin.ema = [p.detach().clone() for p in twin.params]

    graph = network_graph(method, data, compute_of(config))
    # The key of the first step, as make_train_step derives it.
    key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))[1]
    draws = method.draw(key, batch, num_keep)

    def loss(params):
        total, terms = method.loss(nnx.merge(graph, params), draws)
        return total.mean(), terms

    gradient, terms = jax.jit(jax.grad(loss, has_aux=True))(params)
    _, denoise_loss, mae_loss = twin.loss(to_torch_draws(draws))
    np.testing.assert_allclose(denoise_loss.detach(), terms["denoise_loss"], rtol=1e-4)
    if mask_ratio:
        np.testing.assert_allclose(mae_loss.detach(), terms["mae_loss"], rtol=1e-4)

    state, metrics = training.step(training.start(params), batch, num_keep)
    assert twin.update(to_torch_draws(draws)).item() == pytest.approx(float(metrics["loss"]), rel=1e-4)
    for ours, theirs in (
        (gradient, [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.params]),
        (state.params, twin.params),
        (state.ema["ema"], twin.ema),
    ):
        expected = as_torch(ours)
        for (name, _), value in zip(twin.denoiser.named_parameters(), theirs):
            pair = [value.detach(), expected[name]]
            if name.endswith("qkv.bias"):
                # Softmax does not see the keys' biases: their gradient is rounding, made steps by Adam.
                pair = [torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in pair]
            assert (pair[0] - pair[1]).norm() <= 1e-5 * pair[1].norm(), name


def test_what_the_torch_model_is_not_is_refused():
    with pytest.raises(UserError, match=r"the torch model is MaskDiT's: method\.name=maskdm"):
        torch_options(tiny_config(config="digits_maskdm_pretrain", devices=1))
    with pytest.raises(UserError, match=r"the torch step has no optimizer\.clip_norm"):
        torch_options(tiny_config({"optimizer.clip_norm": 1}, devices=1))
    with pytest.raises(UserError, match=r"on a CPU torch computes in float32"):
        torch_options(tiny_config({"compute.precision": "bfloat16"}, devices=1))
