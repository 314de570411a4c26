"""Parity of MaskDM with the authors' implementation: the network and the names of its tensors."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_maskdm import INFO, LAYOUT, MaskDMCase, assert_close, maskdm_case, named_input

from maskdit_jax.methods.method import Shape
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.embed import noise_features
from maskdit_jax.models.masking import TokenMask, keep_rows, random_mask
from maskdit_jax.models.uvit import SIZES, UViT

CASES = ["uncond", "cond", "alt"]
# Of what takes long the fast tier has the one that has all kinds of tokens.
COND_FIRST = ["cond", *(pytest.param(name, marks=pytest.mark.slow) for name in ("uncond", "alt"))]


def nothing_hidden(case: MaskDMCase) -> TokenMask:
    ids = jnp.broadcast_to(jnp.arange(case.num_patches), (len(case["t"]), case.num_patches))
    return TokenMask(ids, ids, ids)


@pytest.mark.parametrize("name", COND_FIRST)
def test_outputs(name):
    """Image without mask; with one the visible patches, in its order, and the tokens before the last map."""
    case = maskdm_case(name)
    x, t = jnp.asarray(case["x"]), jnp.asarray(case["t"])

    @jax.jit
    def run(params, x, t, labels, mask, full):
        network = nnx.merge(case.graphdef, params)
        return {
            "out_full": network(x, t, labels),
            "out_mask": network(x, t, labels, mask),
            "out_zeromask": network(x, t, labels, full),
            "encoder_tokens_mask": network.encode(x, t, labels, mask),
        }

    outputs = run(case.params, x, t, case.labels, case.mask, nothing_hidden(case))
    if name == "cond":
        without = run(case.params, x, t, jnp.full(len(t), -1), case.mask, nothing_hidden(case))
        outputs |= {f"{key}_nolabel": without[key] for key in ("out_full", "out_mask")}
    assert set(outputs) == {key for key in case.arrays if key.startswith(("out", "encoder"))}
    for key, value in outputs.items():
        assert value.dtype == jnp.float32
        assert_close(value, case[key], 2e-5)
    assert_close(noise_features(t, case.network.hidden_size), case["time_sinusoid"], 1e-4)


@pytest.mark.parametrize("name", [*CASES, "base256"])
def test_names_and_shapes_are_the_authors(name):
    """All of them, in any order; and what is read of the shapes is the network they came from."""
    case = MaskDMCase(name)
    shapes = case.shapes()
    assert shapes == {entry["key"]: tuple(entry["shape"]) for entry in case.info["keys"]}
    assert sum(np.prod(shape) for shape in shapes.values()) == case.info["params"]

    assert LAYOUT.recognises(shapes)
    found = LAYOUT.read_options(shapes)
    assert found["data"] == case.data._asdict()
    size = found["network"].pop("size")
    assert size == ("B/4" if name == "base256" else "custom")
    heads = case.network.num_heads
    # Four blocks of depth and five give the same five: read as five, where no published size decides.
    depth = case.network.depth if name == "base256" else 5
    assert found["network"] | {"num_heads": heads} == vars(case.network) | {"depth": depth}
    published, width = LAYOUT.heads(SimpleNamespace(**found["network"]))["num_heads"]
    assert (published, width) == (heads if name == "base256" else 0, case.network.hidden_size)


@pytest.mark.parametrize(("size", "image_size", "expected"), [("S", 64, "small64"), ("S", 256, "small256")])
def test_published_sizes(size, image_size, expected):
    depth, width, heads = SIZES[size]
    data = Shape(image_size, 3, 0)
    network = SimpleNamespace(hidden_size=width, depth=depth, num_heads=heads, patch_size=4)

    def tensors():
        options = vars(network) | data._asdict()
        params = nnx.to_pure_dict(nnx.split(UViT(**options, compute=Compute(), rngs=nnx.Rngs(0)))[1])
        return LAYOUT.to_torch(params, network, data)

    shapes = {key: x.shape for key, x in jax.eval_shape(tensors).items()}
    assert sum(np.prod(shape) for shape in shapes.values()) == INFO[f"{expected}_params"]
    found = LAYOUT.read_options(shapes)["network"]
    assert (found["size"], found["depth"]) == (f"{size}/4", depth)
    assert LAYOUT.model_name(network) == f"MaskDM-{size}/4"


@pytest.mark.parametrize("name", CASES)
def test_weights_there_and_back_keep_every_bit(name):
    case = maskdm_case(name)
    tensors = case.tensors()
    back = case.to_torch(case.params)
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(back[key], value, err_msg=key)


def test_missing_and_unexpected_names():
    case = maskdm_case("cond")
    tensors = case.tensors()
    for name in ("encoder_pos_embed", "in_blocks.1.norm2.bias", "mid_block.attn.proj.bias"):
        with pytest.raises(KeyError, match=name):
            LAYOUT.from_torch({k: v for k, v in tensors.items() if k != f"encoder.{name}"}, case.network)
    for name in ("encoder.cls_token", "encoder.in_blocks.99.norm1.weight"):
        with pytest.raises(KeyError, match=f"unexpected torch keys: {name}"):
            LAYOUT.from_torch(tensors | {name: np.zeros(1, np.float32)}, case.network)


@pytest.mark.slow
def test_initialisation():
    """Linear maps, tables, positions: truncated, of standard deviation 0.02; biases 0, scales 1."""
    case = maskdm_case("cond")
    state = jax.jit(lambda: nnx.split(case.build(nnx.Rngs(0)))[1])()
    for path, leaf in nnx.to_flat_state(state):
        value, name = np.asarray(leaf[...]), path[-1]
        if name in ("bias", "scale"):
            np.testing.assert_array_equal(value, 1 if name == "scale" else 0)
        else:
            assert np.abs(value).max() < 2.3 * 0.02
            assert value.std() == pytest.approx(0.02, rel=4 / np.sqrt(value.size)), path


@pytest.mark.slow
def test_half_precision_and_recomputation():
    """bfloat16 is close, gradients are float32, and what is computed again gives the same gradients."""
    options = {"image_size": 8, "channels": 1, "num_classes": 3, "patch_size": 2, "hidden_size": 32}
    options |= {"depth": 3, "num_heads": 2, "qkv_bias": True, "time_mlp": True}
    x, t, labels = jax.random.normal(jax.random.key(0), (2, 8, 8, 1)), jnp.array([3, 900]), jnp.array([-1, 2])
    mask = random_mask(jax.random.uniform(jax.random.key(1), (2, 16)), 6)

    def split(compute):
        return nnx.split(nnx.eval_shape(lambda: UViT(**options, compute=compute, rngs=nnx.Rngs(0))))

    rng = np.random.default_rng(0)
    shapes = split(Compute())[1]
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), shapes)

    def output_and_gradient(**compute):
        graphdef = split(Compute(**compute))[0]

        def loss(params):
            output = nnx.merge(graphdef, params)(x, t, labels, mask)
            return jnp.square(output).mean(), output

        gradient, output = jax.jit(jax.grad(loss, has_aux=True))(params)
        return output, jnp.concatenate([x.ravel() for x in jax.tree.leaves(gradient)])

    expected, exact = output_and_gradient(precision="float32")
    again = output_and_gradient(precision="float32", remat="full")[1]
    np.testing.assert_allclose(again, exact, rtol=0, atol=1e-5 * float(jnp.abs(exact).max()))
    output, gradient = output_and_gradient(precision="bfloat16")
    assert output.dtype == gradient.dtype == jnp.float32
    assert 1e-4 < float(jnp.abs(output - expected).max() / jnp.abs(expected).max()) < 0.05
    assert float(jnp.linalg.norm(gradient - exact) / jnp.linalg.norm(exact)) < 0.05


@pytest.mark.slow
def test_gradient_of_kept_positions():
    """What autodiff makes of the same rows."""
    keys = jax.random.split(jax.random.key(0), 3)
    table, weights = jax.random.normal(keys[0], (9, 4)), jax.random.normal(keys[1], (5, 6, 4))
    mask = random_mask(jax.random.uniform(keys[2], (5, 9)), 6)

    def rows(keep):
        return jax.value_and_grad(lambda table: (weights * keep(table) ** 2).sum())(table)

    for actual, expected in zip(
        rows(lambda table: keep_rows(table, mask)), rows(lambda table: table[mask.keep_ids]), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


@pytest.mark.slow
def test_outputs_of_the_papers_base_network():
    """MaskDM-B at 256 pixels, 4,096 patches: with 90 % of them hidden, and whole."""
    case = MaskDMCase("base256")
    images = named_input(case.info["input_name"], (1, 3, 256, 256))
    np.testing.assert_array_equal(images[0, :, :2, :8], case.arrays["x_head"])
    x, labels = jnp.asarray(images.transpose(0, 2, 3, 1)), jnp.full(1, -1)

    @jax.jit
    def run(params, mask):
        return nnx.merge(case.graphdef, params)(x, jnp.asarray(case["t"]), labels, mask)

    assert_close(run(case.params, case.mask), case["out_mask"], 5e-5)
    full = np.asarray(run(case.params, None)).transpose(0, 3, 1, 2)
    assert_close(full[:, :, ::3, ::3], case.arrays["out_full_stride3"], 5e-5)
    assert_close(full.mean((0, 2, 3)), case["out_full_channel_mean"], 5e-5)
    assert_close(full.std((0, 2, 3)), case["out_full_channel_std"], 5e-5)
