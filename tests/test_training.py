"""Laws of the training step: start loss, masking, randomness, meshes, skipped steps, schedules."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from maskdit_jax.data.codec import Codec
from maskdit_jax.distributed.mesh import AXES, make_mesh, state_shardings
from maskdit_jax.methods.maskdit import MaskDiT, MaskDiTNetwork, mask_ratio_at
from maskdit_jax.methods.method import Shape, init_params, network_graph
from maskdit_jax.models.blocks import BlockStack, gelu
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.masking import random_mask, restore_tokens
from maskdit_jax.training.ema import update_ema
from maskdit_jax.training.optimizer import (
    MAX_PROGRAMS,
    learning_rate_schedule,
    make_optimizer,
    rounded_schedule,
)
from maskdit_jax.training.state import init_state
from maskdit_jax.training.step import make_train_step

NETWORK = MaskDiTNetwork(
    size="custom",
    patch_size=2,
    hidden_size=32,
    depth=2,
    num_heads=4,
    decoder_hidden_size=16,
    decoder_depth=2,
    decoder_num_heads=2,
)
METHOD, DATA = MaskDiT(network=NETWORK), Shape(image_size=8, channels=2, num_classes=5)
COMPUTE = Compute(precision="float32")
NUM_TOKENS = 16
ONE_DEVICE = jax.make_mesh((1, 1), AXES, axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])


@functools.cache
def fresh_params(data: Shape = DATA) -> dict:
    return jax.jit(lambda: init_params(METHOD, data, COMPUTE, 0))()


@functools.cache
def trained_params(data: Shape = DATA) -> dict:
    """Parameters none of which is zero, as after some training."""
    params = fresh_params(data)
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)


def batch_of(size: int = 16, seed: int = 0) -> dict[str, jax.Array]:
    key = jax.random.key(seed)
    return {
        "clean": 0.5 * jax.random.normal(key, (size, 8, 8, 2)),
        "labels": jax.random.randint(key, (size,), 0, 5),
    }


def adamw(learning_rate: float = 1e-3) -> optax.GradientTransformation:
    return make_optimizer(
        lambda _: learning_rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, clip_norm=1.0
    )


@functools.cache
def train_step(seed: int = 3, accumulate: int = 1, compute: Compute = COMPUTE):
    """The jitted step; tests share the programs, so they use one batch size."""
    step = make_train_step(
        METHOD,
        network_graph(METHOD, DATA, compute),
        Codec("latents", 0.18215),
        adamw(),
        {"ema": lambda ema, params, update: update_ema(ema, params, 0.99)},
        ONE_DEVICE,
        seed=seed,
        accumulate=accumulate,
    )
    return jax.jit(step, static_argnums=2)


def assert_trees_close(actual, expected, rtol: float, atol: float = 0.0) -> None:
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(np.asarray(a), np.asarray(e), rtol=rtol, atol=atol),
        actual,
        expected,
    )


def assert_trees_equal(actual, expected) -> None:
    assert_trees_close(actual, expected, rtol=0)


@pytest.mark.slow
def test_loss_at_start_is_one():
    """A zero-initialised output layer on data of std sigma_data: E[w·(c_skip·x - clean)²] = 1."""
    draws = METHOD.draw(jax.random.key(1), batch_of(4096), NUM_TOKENS)

    # Parameters are arguments: jaxlib 0.10.2's CPU compiler may turn constant zero kernels into NaN.
    @jax.jit
    def loss(params):
        return METHOD.loss(nnx.merge(network_graph(METHOD, DATA, COMPUTE), params), draws)[0].mean()

    assert float(loss(fresh_params())) == pytest.approx(1.0, abs=0.01)


@pytest.fixture(scope="module")
def network():
    return nnx.merge(network_graph(METHOD, DATA, COMPUTE), trained_params())


def test_changing_a_hidden_patch_changes_no_output(network):
    """The encoder never sees hidden patches: every output is bit-identical."""
    x, labels, c_noise = batch_of(3)["clean"], jnp.array([0, 3, -1]), jnp.array([-1.0, 0.0, 0.5])
    mask = random_mask(jax.random.uniform(jax.random.key(2), (3, NUM_TOKENS)), 8)
    pixels = mask.hidden.reshape(3, 4, 4).repeat(2, axis=1).repeat(2, axis=2)[..., None]
    other = jnp.where(pixels == 1, 100.0, x)
    apply = jax.jit(network)
    assert not np.array_equal(x, other)
    np.testing.assert_array_equal(apply(x, c_noise, labels, mask), apply(other, c_noise, labels, mask))


def test_keeping_every_token_in_any_order_equals_the_unmasked_path(network):
    x, labels, c_noise = batch_of(3)["clean"], jnp.array([0, 3, -1]), jnp.array([-1.0, 0.0, 0.5])
    mask = random_mask(jax.random.uniform(jax.random.key(2), (3, NUM_TOKENS)), NUM_TOKENS)
    apply = jax.jit(network)
    np.testing.assert_allclose(
        apply(x, c_noise, labels, mask), apply(x, c_noise, labels), rtol=1e-4, atol=1e-5
    )


@pytest.mark.slow
def test_hidden_patches_get_no_denoising_gradient():
    """The denoising term does not depend on the prediction at hidden patches."""
    batch = batch_of(4)
    draws = dataclasses.replace(METHOD, label_dropout=0.0).draw(jax.random.key(1), batch, 6)

    def denoise_loss(prediction):
        _, terms = METHOD.loss(lambda *_: prediction, draws)
        return terms["denoise_loss"].sum()

    gradient = jax.grad(denoise_loss)(jnp.ones_like(batch["clean"]))
    hidden = draws.mask.hidden.reshape(4, 4, 4).repeat(2, axis=1).repeat(2, axis=2) == 1
    assert hidden.mean() == 10 / 16
    assert (np.asarray(gradient)[hidden] == 0).all()
    assert (np.asarray(gradient)[~hidden] != 0).all()


def test_a_stack_in_two_parts_is_the_whole_and_emits_what_each_block_returned():
    class Add(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.bias = nnx.Param(jax.random.normal(rngs.params(), (4,)))

        def __call__(self, x, scale, skip):
            return scale * x + self.bias[...][None, None] + skip

    stack = BlockStack(Add, 5, compute=COMPUTE, rngs=nnx.Rngs(0))
    x, skips = jnp.ones((2, 3, 4)), jax.random.normal(jax.random.key(1), (5, 2, 3, 4))
    whole, emitted = stack(x, 0.5, own=skips, emit=True)
    first, some = stack(x, 0.5, own=skips[:2], stop=2, emit=True)
    np.testing.assert_array_equal(stack(first, 0.5, own=skips[2:], start=2), whole)
    np.testing.assert_array_equal(emitted[:2], some)
    np.testing.assert_array_equal(emitted[-1], whole)
    np.testing.assert_allclose(
        emitted[0], 0.5 * x + stack.layers.bias[...][0][None, None] + skips[0], rtol=1e-6
    )


def test_restoring_puts_every_visible_token_back_and_filler_elsewhere():
    tokens = jax.random.normal(jax.random.key(0), (3, NUM_TOKENS, 4))
    mask = random_mask(jax.random.uniform(jax.random.key(2), (3, NUM_TOKENS)), 5)
    kept = jnp.take_along_axis(tokens, mask.keep_ids[:, :, None], axis=1)
    restored = restore_tokens(kept, mask, jnp.full(4, 7.0))
    hidden = mask.hidden[..., None] == 1
    np.testing.assert_array_equal(restored, jnp.where(hidden, 7.0, tokens))


def test_gelu_in_half_precision_has_the_derivative_of_float32_rounded_once():
    x = jnp.linspace(-6, 6, 1001).astype(jnp.bfloat16)
    derivative = jax.vjp(gelu, x)[1](jnp.ones_like(x))[0]
    exact = jax.vmap(jax.grad(lambda x: jax.nn.gelu(x)))(x.astype(jnp.float32))
    assert derivative.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(derivative), np.asarray(exact.astype(jnp.bfloat16)))


def test_gradient_of_restoring_equals_autodiff_of_a_scatter():
    mask = random_mask(jax.random.uniform(jax.random.key(2), (3, NUM_TOKENS)), 5)
    kept, filler = jax.random.normal(jax.random.key(0), (3, 5, 4)), jnp.ones(4)
    weights = jax.random.normal(jax.random.key(1), (3, NUM_TOKENS, 4))

    def by_scatter(kept, filler):
        tokens = jnp.broadcast_to(filler, (3, NUM_TOKENS, 4))
        return tokens.at[jnp.arange(3)[:, None], mask.keep_ids].set(kept)

    ours = jax.grad(lambda k, f: (restore_tokens(k, mask, f) * weights).sum(), (0, 1))(kept, filler)
    reference = jax.grad(lambda k, f: (by_scatter(k, f) * weights).sum(), (0, 1))(kept, filler)
    assert_trees_close(ours, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_loss_falls_and_the_ema_follows_the_numpy_loop():
    step, batch = train_step(), batch_of()
    batch["clean"] = jnp.where(batch["labels"][:, None, None, None] > 2, 0.5, -0.5) + 0 * batch["clean"]
    state = init_state(fresh_params(), adamw())
    ema, losses = jax.device_get(state.ema["ema"]), []
    for _ in range(40):
        state, metrics = step(state, batch, 8)
        losses.append(float(metrics["denoise_loss"]))
        ema = jax.tree.map(lambda e, p: 0.99 * e + 0.01 * p, ema, jax.device_get(state.params))
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:5])
    assert_trees_close(state.ema["ema"], ema, rtol=1e-4, atol=1e-6)


def test_ema_of_constant_parameters_is_those_parameters():
    params = trained_params()
    assert_trees_equal(update_ema(params, params, 0.9), params)


@pytest.mark.slow
def test_accumulated_microbatches_equal_the_whole_batch():
    state = init_state(trained_params(), adamw())
    whole, whole_metrics = train_step()(state, batch_of(), 8)
    cut, cut_metrics = train_step(accumulate=4)(state, batch_of(), 8)
    assert_trees_close(cut_metrics, whole_metrics, rtol=1e-5)
    # Adam divides by the gradient's size: compare its first moment, the gradient itself.
    assert_trees_close(cut.opt_state[1][0].mu, whole.opt_state[1][0].mu, rtol=1e-4, atol=1e-8)


def test_large_parameters_are_cut_over_fsdp_and_small_ones_are_whole():
    mesh = make_mesh(1, 8)
    shapes = {"stacked": jnp.zeros((4, 128, 384)), "bias": jnp.zeros(384), "odd": jnp.zeros((131, 131))}
    specs = jax.tree.map(lambda s: s.spec, state_shardings(shapes, mesh))
    assert specs["stacked"] == PartitionSpec(None, None, "fsdp")
    assert specs["bias"] == specs["odd"] == PartitionSpec()


@pytest.mark.slow
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    step, good = train_step(), batch_of()
    bad = good | {"clean": good["clean"].at[3, 0, 0, 0].set(jnp.nan)}
    state, _ = step(init_state(trained_params(), adamw()), good, 8)
    skipped, metrics = step(state, bad, 8)
    for name in ("params", "ema", "opt_state"):
        assert_trees_equal(getattr(skipped, name), getattr(state, name))
    assert int(skipped.step) == int(state.step) + 1
    skipped, metrics = step(skipped, bad, 8)
    assert (int(metrics["nonfinite_in_row"]), int(metrics["nonfinite_total"])) == (2, 2)
    metrics = step(skipped, good, 8)[1]
    assert (int(metrics["nonfinite_in_row"]), int(metrics["nonfinite_total"])) == (0, 2)
    assert np.isfinite(metrics["loss"])


@pytest.mark.slow
def test_draws_depend_on_seed_and_step_only():
    state = init_state(trained_params(), adamw())
    first = train_step()(state, batch_of(), 8)[1]["loss"]
    assert train_step()(state, batch_of(), 8)[1]["loss"] == first
    assert train_step(seed=4)(state, batch_of(), 8)[1]["loss"] != first
    later = state._replace(step=state.step + 1)
    assert train_step()(later, batch_of(), 8)[1]["loss"] != first


@pytest.mark.slow
def test_moments_are_drawn_anew_at_every_step():
    moments = jax.random.normal(jax.random.key(0), (16, 8, 8, 4))
    batch = {"moments": moments, "labels": batch_of()["labels"]}
    state = init_state(trained_params(), adamw())
    exact = {"clean": 0.18215 * moments[..., :2], "labels": batch["labels"]}
    assert train_step()(state, batch, 8)[1]["loss"] != train_step()(state, exact, 8)[1]["loss"]
    collapsed = batch | {"moments": moments.at[..., 2:].set(-30.0)}  # variance e^-30: the mean itself
    np.testing.assert_allclose(
        train_step()(state, collapsed, 8)[1]["loss"], train_step()(state, exact, 8)[1]["loss"], rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"remat": "mlp", "unroll": "full"}, {"remat": "full"}])
def test_unrolling_and_rematerialisation_do_not_change_the_gradient(options):
    """The same losses and gradients from one set of parameters."""

    def gradient(compute):
        step = train_step(compute=compute)
        state, metrics = step(init_state(trained_params(), adamw()), batch_of(), 8)
        return metrics, state.opt_state[1][0].mu

    assert_trees_close(
        gradient(dataclasses.replace(COMPUTE, **options)), gradient(COMPUTE), rtol=1e-4, atol=1e-7
    )


@pytest.mark.slow
def test_half_precision_stays_close_and_keeps_float32_parameters():
    half, state = train_step(compute=Compute(precision="bfloat16")), init_state(trained_params(), adamw())
    new_state, metrics = half(state, batch_of(), 8)
    reference = train_step()(state, batch_of(), 8)[1]
    assert float(metrics["loss"]) == pytest.approx(float(reference["loss"]), rel=0.02)
    assert {x.dtype for x in jax.tree.leaves(new_state.params)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_network_without_classes_ignores_labels():
    data = DATA._replace(num_classes=0)
    network = jax.jit(nnx.merge(network_graph(METHOD, data, COMPUTE), trained_params(data)))
    x, c_noise = batch_of(2)["clean"], jnp.zeros(2)
    np.testing.assert_array_equal(
        network(x, c_noise, jnp.array([1, 2])), network(x, c_noise, jnp.array([-1, 4]))
    )


@pytest.mark.slow
def test_initialisation_is_the_papers():
    """Zero: every modulation, the bridge and the output; normal 0.02: embeddings; Xavier elsewhere."""
    network = dataclasses.replace(NETWORK, hidden_size=256, decoder_hidden_size=128)
    wide = MaskDiT(network=network), DATA, COMPUTE
    model = nnx.merge(network_graph(*wide), jax.jit(lambda: init_params(*wide, 0))())
    stacks = (model.encoder.layers, model.decoder.layers)
    zero = [s.modulation.linear.kernel for s in stacks]
    zero += [part.linear.kernel for m in (model.bridge, model.output) for part in (m, m.modulation)]
    zero += [model.patch_embedding.bias, model.encoder.layers.attention.qkv.bias]
    assert all(not np.any(p[...]) for p in zero)
    normal = [model.noise_embedding.fc1.kernel, model.label_embedding.table, model.mask_token]
    assert [float(np.std(p[...])) for p in normal] == pytest.approx([0.02] * 3, rel=0.2)
    layers = model.encoder.layers
    for linear in (model.patch_embedding, layers.attention.qkv, layers.mlp.fc1):
        kernel = np.asarray(linear.kernel[...])
        bound = np.sqrt(6 / sum(kernel.shape[-2:]))
        assert 0.95 * bound < np.abs(kernel).max() <= bound
    first, second = model.encoder.layers.mlp.fc1.kernel[...][:2]
    assert not np.array_equal(first, second)


def test_warm_up_is_linear_and_moves_on_the_first_update():
    rate = learning_rate_schedule(1e-3, warmup_kimg=1.28, batch_size=128)
    np.testing.assert_allclose(
        [rate(i) for i in (0, 4, 9, 10, 500)], [1e-4, 5e-4, 1e-3, 1e-3, 1e-3], rtol=1e-6
    )
    assert float(learning_rate_schedule(1e-3, 0.0, 128)(0)) == pytest.approx(1e-3)


@pytest.mark.parametrize("schedule", ["cosine4", "exp", "linear", "constant"])
def test_mask_schedule_compiles_at_most_sixteen_programs_and_ends_exactly(schedule):
    method = dataclasses.replace(METHOD, mask_schedule=schedule)
    data = Shape(image_size=32, channels=4, num_classes=0)  # 256 tokens
    num_keep, levels = rounded_schedule(
        functools.partial(method.num_keep, data, num_steps=1000), *method.num_keep_range(data, 1000)
    )
    visited = [num_keep(step) for step in range(1000)]
    assert set(visited) <= set(levels)
    assert len(levels) <= MAX_PROGRAMS
    exact = [int(256 * (1 - mask_ratio_at(s / 999, schedule, 0.5, 0.0))) for s in (0, 999)]
    assert [visited[0], visited[-1]] == exact
    assert len(levels) == (1 if schedule == "constant" else MAX_PROGRAMS)
