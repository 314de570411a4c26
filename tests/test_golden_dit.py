"""Parity of DiT with the authors' implementation: network, guidance, training step, names of tensors."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_case import GOLDEN
from golden_dit import COMPUTE, INFO, LATENTS, LAYOUT, dit_case, tensor_shapes
from golden_maskdm import assert_close

from maskdit_jax.diffusion.guidance import NULL_LABEL, drop_labels, guide, null_label_sides
from maskdit_jax.methods.dit import DiT, DiTDraws, DiTNetwork
from maskdit_jax.methods.method import Shape, init_params, network_graph
from maskdit_jax.models.embed import LabelEmbedding, position_table

LOSS = np.load(GOLDEN / "fbdit_s2_loss.npz")


@pytest.mark.slow
def test_outputs_and_guidance():
    """One row has no class. Guidance is of three channels; the others stay each side's own."""
    case = dit_case()

    @jax.jit
    def run(params, x, t, labels, guided_x, guided_t, guided_labels):
        network = case.network(params)
        sides = null_label_sides(network)
        return {
            "out": network(x, t, labels),
            "t_embedding": network.noise_embedding(t),
            "guided": guide(sides, 4.0, 3)(guided_x, guided_t, guided_labels),
            "weak": sides(guided_x, guided_t, guided_labels)[1],
        }

    assert (case["cfg_scale"], list(case["cfg_y"][2:])) == (4.0, [NULL_LABEL] * 2)
    half = [jnp.asarray(case[f"cfg_{name}"][:2]) for name in ("x", "t", "y")]
    ours = run(case.params, *(jnp.asarray(case[name]) for name in ("x", "t", "y")), *half)
    for name in ("out", "t_embedding"):
        assert_close(ours[name], case[name], 2e-5)
    expected = case["cfg_out"]
    assert_close(ours["guided"], expected[:2], 2e-5)
    assert_close(ours["guided"][..., :3], expected[2:, ..., :3], 2e-5)
    assert_close(ours["weak"][..., 3:], expected[2:, ..., 3:], 2e-5)


@pytest.mark.slow
def test_loss_and_gradient_of_every_parameter():
    """At t = 0, 500 and 999: both terms; the norm of each gradient, of all together, two value by value."""
    case = dit_case()
    draws = DiTDraws(*(jnp.asarray(case[f"loss/{name}"]) for name in ("x0", "noise", "t", "y")))

    @jax.jit
    def run(params, draws):
        def loss(params):
            per_sample, terms = case.method.loss(case.network(params), draws)
            return per_sample.mean(), terms | {"loss": per_sample}

        return jax.value_and_grad(loss, has_aux=True)(params)

    (mean, terms), gradient = run(case.params, draws)
    np.testing.assert_allclose(mean, LOSS["loss_mean"], rtol=1e-5)
    for ours, theirs in {"denoise_loss": "mse", "variance_loss": "vb", "loss": "loss"}.items():
        assert_close(terms[ours], LOSS[f"term_{theirs}"], 1e-5)

    gradients = LAYOUT.to_torch(jax.device_get(gradient), case.method.network, LATENTS)
    del gradients["pos_embed"]  # no parameter
    norms = {key: float(np.linalg.norm(value)) for key, value in gradients.items()}
    expected = INFO["s2_loss"]["grad_norms"]
    assert norms.keys() == expected.keys()
    for key, norm in expected.items():
        np.testing.assert_allclose(norms[key], norm, rtol=1e-4, atol=1e-7, err_msg=key)
    np.testing.assert_allclose(np.linalg.norm(list(norms.values())), LOSS["grad_global_norm"], rtol=1e-5)
    assert_close(gradients["final_layer.linear.bias"], LOSS["grad_final_linear_bias"], 1e-5)
    assert_close(gradients["x_embedder.proj.weight"], LOSS["grad_patch_proj"], 1e-5)


def test_position_table_has_the_column_first():
    golden = np.load(GOLDEN / "fbdit_s2.npz")["pos_embed_head"]
    np.testing.assert_allclose(position_table(384, 16)[:40], golden, rtol=0, atol=1e-6)


def test_a_dropped_label_is_the_last_row_of_the_table():
    golden = np.load(GOLDEN / "fbdit_s2.npz")
    kept, dropped = (
        drop_labels(jax.random.key(0), jnp.asarray(golden["drop_labels_in"]), share) for share in (0.0, 1.0)
    )
    labels = np.where(golden["drop_flags"] == 1, dropped, kept)
    embedding = LabelEmbedding(1000, 2, null_row=True, dtype=jnp.float32, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(
        embedding(jnp.asarray(labels)), embedding.table[...][golden["drop_labels_out"]], rtol=1e-6
    )


@pytest.mark.slow
def test_names_shapes_and_counts_of_the_published_networks():
    """The tensors of XL/2 by name; the values of all twelve networks at two resolutions."""
    keys = json.loads((GOLDEN / "fbdit_xl2_keys.json").read_text())
    expected = {entry["key"]: tuple(entry["shape"]) for entry in keys}
    shapes = tensor_shapes(DiT(network=DiTNetwork(size="XL/2")), LATENTS)
    assert shapes == expected
    assert LAYOUT.recognises(shapes)
    found = LAYOUT.read_options(shapes)
    assert found["data"] == LATENTS._asdict()
    assert DiTNetwork(**found["network"]) == DiTNetwork(size="XL/2")

    counts = {}
    for size in [f"{name}/{patch}" for name in ("S", "B", "L", "XL") for patch in (2, 4, 8)]:
        method = DiT(network=DiTNetwork(size=size))
        params = jax.eval_shape(lambda method=method: init_params(method, LATENTS, COMPUTE, 0))
        trainable = sum(x.size for x in jax.tree.leaves(params))
        for resolution in (256, 512):
            data = LATENTS._replace(image_size=resolution // 8)
            table = method.network.hidden_size * method.num_tokens(data)
            counts[f"DiT-{size}@{resolution}"] = {"params": trainable + table, "trainable": trainable}
    assert counts == INFO["param_counts"]


@pytest.fixture(scope="module")
def small():
    """Method, data and random tensors of a small network."""
    method = DiT(network=DiTNetwork(size="custom", hidden_size=16, depth=2, num_heads=2, patch_size=2))
    data = Shape(image_size=8, channels=1, num_classes=3)
    rng = np.random.default_rng(0)
    shapes = tensor_shapes(method, data)
    tensors = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    return method, data, tensors | LAYOUT.fixed_tensors(method.network, data)


def test_weights_there_and_back_keep_every_bit_and_a_network_takes_them(small):
    method, data, tensors = small
    params = LAYOUT.from_torch(tensors, method.network)
    back = LAYOUT.to_torch(params, method.network, data)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)
    network = nnx.merge(network_graph(method, data, COMPUTE), params)
    t, labels = jnp.array([0, 999]), jnp.array([2, NULL_LABEL])
    assert jax.eval_shape(network, jnp.zeros((2, 8, 8, 1)), t, labels).shape == (2, 8, 8, 2)


def test_missing_and_unexpected_names(small):
    method, _, tensors = small
    for name in ("t_embedder.mlp.2.bias", "blocks.1.mlp.fc2.weight", "final_layer.linear.bias"):
        with pytest.raises(KeyError, match=name):
            LAYOUT.from_torch({k: v for k, v in tensors.items() if k != name}, method.network)
    for name in ("cls_token", "blocks.99.norm1.weight"):
        with pytest.raises(KeyError, match=f"unexpected torch keys: {name}"):
            LAYOUT.from_torch(tensors | {name: np.zeros(1, np.float32)}, method.network)
