"""Costs: multiply-adds against counts of the authors' networks, memory against what must be kept."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from tiny import ROOT, call_tool, refusal, tiny_flags

from maskdit_jax.config import resolve
from maskdit_jax.config_file import load
from maskdit_jax.training.cost import (
    activation_bytes,
    cost_of,
    inference_macs,
    train_flops_per_image,
    training_macs,
)
from maskdit_jax.training.cost_report import compared_by_default
from maskdit_jax.training.products import ATTENTION, LINEAR, Key, trace_products

GOLDEN = json.loads((ROOT / "tests/golden/costs.json").read_text())["models"]


def recipe(name, *options):
    return resolve(load(name, [f"--config.{option}" for option in options]), device_count=1)


def agree(macs, golden, hidden=0.0):
    """The same products of attention, and the same in all but for the labels', of one-hot rows.

    hidden: the share of patches that the authors' network embeds before it drops them; ours does not.
    """
    embedding = macs[Key("patch_embedding", LINEAR)] * hidden / (1 - hidden)
    attention = sum(n for key, n in macs.items() if key.kind == ATTENTION)
    total = pytest.approx(golden["total"], rel=2e-5)
    return attention == golden["attention_products"] and macs.total() + embedding == total


@pytest.mark.parametrize("name, resolution", [("in256", 256), ("in512", 512)])
def test_maskdit_xl2(name, resolution):
    golden, config = GOLDEN[f"MaskDiT-XL/2@{resolution}"], recipe(name)
    macs = training_macs(config)
    assert agree(macs, golden["train_step_forward"], hidden=0.5)
    assert agree(inference_macs(config), golden["forward_mask0.0"])
    assert train_flops_per_image(config) == 6 * macs.total()
    for part, tokens in (("encoder", "half"), ("decoder", "all")):
        expected = golden[f"part_{part}_blocks_{tokens}_tokens"]
        found = {key.kind: n for key, n in macs.items() if key.part == part}
        assert found == {LINEAR: expected["linear_and_conv"], ATTENTION: expected["attention_products"]}


@pytest.mark.parametrize("ratio", [0.75])
def test_mask_ratio(ratio):
    macs = training_macs(recipe("in256", f"method.mask_ratio={ratio}"))
    assert agree(macs, GOLDEN["MaskDiT-XL/2@256"][f"forward_mask{ratio}"], hidden=ratio)


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_maskdm_base(ratio):
    golden, config = GOLDEN["MaskDM-B@256"], recipe("celebahq256_pretrain", f"method.mask_ratio={ratio}")
    expected = golden[f"forward_mask{ratio}_block4"]
    assert agree(training_macs(config), expected, hidden=1 - expected["visible_patches"] / 4096)
    assert agree(inference_macs(config), golden["forward_full"])


@pytest.mark.parametrize("remat, arrays", [("none", 18), ("mlp", 8), ("full", 1)])
def test_activations_of_xl2(remat, arrays):
    """So many arrays of the size of a block's input are kept for each block, in bfloat16.

    none: two norms, qkv (3), attention, projection, fc1 (4), GELU (4), fc2, the residual stream (2).
    """
    kept = activation_bytes(recipe("in256", f"compute.remat={remat}", "compute.precision=bfloat16"))
    encoder, decoder = 28 * 128 * 1152 * 2, 8 * 256 * 512 * 2
    # A little more: the condition's parts of each block.
    assert kept[Key("encoder", LINEAR)] == pytest.approx(arrays * encoder, rel=0.04)
    assert kept[Key("decoder", LINEAR)] == pytest.approx(arrays * decoder, rel=0.13)
    assert (kept[Key("decoder", ATTENTION)] > 0) == (remat == "none")


@pytest.mark.slow
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("name", [name for name in compared_by_default() if name != "maskdit"])
def test_dit_and_mdt_xl2(name, side):
    """MDT's step is two passes, the second of 70 % of the patches."""
    config = recipe(f"in256_{name}", f"data.image_size={side}")
    golden = GOLDEN[f"{'DiT' if name == 'dit' else 'MDTv1'}-XL/2@{side * 8}"]
    tables = (side // 2) ** 2 * 1152 if name == "dit" else 0  # theirs counts the fixed table of positions
    cost = cost_of(config)
    assert agree(cost.inference, golden.get("forward") or golden["forward_full"])
    assert agree(cost.training, golden.get("forward") or golden["train_step_forward"])
    assert sum(cost.parameters.values()) == golden["params"] - tables


def test_products_belong_to_the_part_of_their_parameter():
    weights = {"qkv": jnp.ones((8, 24)), "out": {"bias": jnp.ones(8), "kernel": jnp.ones((8, 8))}}

    def attention(params, x):  # [N, 8]
        def layer(x, _):
            q, k, v = jnp.split(x @ params["qkv"], 3, axis=-1)
            x = jax.nn.softmax(q @ k.T) @ v
            return jax.jit(lambda x: x @ params["out"]["kernel"] + params["out"]["bias"][None])(x), None

        return jax.lax.scan(layer, x, length=5)[0]

    traced = trace_products(attention, weights, jnp.ones((6, 8)))
    assert traced.macs == {
        Key("qkv", LINEAR): 5 * 6 * 8 * 24,
        Key("qkv", ATTENTION): 5 * 2 * 6 * 6 * 8,
        Key("out", LINEAR): 5 * 6 * 8 * 8,
    }
    assert [[(t.size, t.part) for t in kept] for kept in traced.kept] == [[(6 * 8 * 4, "out")]]


def test_kept_is_what_takes_a_product_to_compute_again():
    """Two layers with tanh between: the second's operand, which is what the backward pass of tanh needs."""
    weights = {"a": jnp.ones((3, 5)), "b": jnp.ones((5, 7))}

    def backward(params, x):
        return jax.vjp(lambda params: jnp.tanh(x @ params["a"]) @ params["b"], params)[1]

    kept = frozenset().union(*trace_products(backward, weights, jnp.ones((2, 3))).kept)
    assert sorted((tensor.size, tensor.part) for tensor in kept) == [(0, "input"), (2 * 5 * 4, "a")]


def test_convolutions_branches_and_loops():
    kernel, image = {"k": jnp.ones((3, 3, 4, 6))}, jnp.ones((1, 8, 8, 4))

    def convolve(params, x):
        names = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, params["k"], (2, 2), "SAME", dimension_numbers=names)

    assert trace_products(convolve, kernel, image).macs == {Key("k", LINEAR): 4 * 4 * 6 * 3 * 3 * 4}

    def branch(params, x):
        return jax.lax.cond(x.sum() > 0, lambda x: x @ params["k"], lambda x: x @ params["k"] @ x, x)

    assert trace_products(branch, {"k": jnp.ones((4, 4))}, jnp.ones((4, 4))).macs.total() == 2 * 4**3

    def unknown(params, x):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ params["k"], x)

    with pytest.raises(ValueError, match="while: a product is computed in it"):
        trace_products(unknown, {"k": jnp.ones((4, 4))}, jnp.ones((4, 4)))


@pytest.mark.slow
def test_methods_side_by_side(monkeypatch, capsys, tmp_path):
    """At a small size; the published ratios stand only beside those that they are of."""
    flags = ["--methods=maskdit,dit", "--size=S/8", "--image_sizes=32", f"--json={tmp_path / 'costs.json'}"]
    call_tool(monkeypatch, "cost", *flags)
    printed = capsys.readouterr().out
    maskdit, dit = json.loads((tmp_path / "costs.json").read_text())["costs"]
    ratio = maskdit["training_macs"] / dit["training_macs"]
    assert printed.splitlines()[-1] == f"training, MaskDiT : DiT, S/8, 32×32×4: {ratio:.1%}"
    assert dit["training_macs"] == dit["inference_macs"]
    assert dit["state_bytes"]["params"] == dit["state_bytes"]["ema"] == 4 * dit["parameters"]
    for cost in (maskdit, dit):
        for name in ("inference_macs", "training_macs"):
            assert sum(sum(part[name].values()) for part in cost["parts"].values()) == cost[name]
        assert sum(part["parameters"] for part in cost["parts"].values()) == cost["parameters"]


@pytest.mark.slow
def test_one_configuration(monkeypatch, capsys, tmp_path):
    file = tmp_path / "cost.json"
    call_tool(monkeypatch, "cost", *tiny_flags({"compute.remat": "full"}), f"--json={file}")
    printed, cost = capsys.readouterr().out, json.loads(file.read_text())
    assert "MaskDiT custom, 8×8×1, 10 classes; 8 of 16 patches visible in training" in printed
    encoder = cost["parts"]["encoder"]
    assert re.search(rf"^encoder +{encoder['parameters']:,} ", printed, re.M)
    assert cost["train_step_flops"] == 6 * cost["training_macs"]
    # Two of three times the products are computed once more, but for those outside of the blocks.
    assert 1.2 < cost["train_step_flops_with_recomputation"] / cost["train_step_flops"] < 4 / 3
    presets = cost["activation_bytes_by_preset"]["float32"]
    assert presets["full"] == cost["activation_bytes"]
    assert presets["full"]["linear"] < presets["mlp"]["linear"] < presets["none"]["linear"]
    half = cost["activation_bytes_by_preset"]["bfloat16"]["none"]["linear"] / presets["none"]["linear"]
    assert 0.5 <= half < 0.52


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--check"], ["--check needs --config=FILE"]),
        (["--config.seed=1"], ["--config.seed=1 needs --config=FILE"]),
        (["--config=digits", "--size=S/2"], ["--size", "without --config"]),
        (["--methods=maskdit,ditt"], ["ditt", "known", "dit"]),
        (["--size=XS/2"], ["XS/2", "XL"]),
        (["--image_sizes=33"], ["data.image_size=33"]),
        (["--image_sizes=big"], ["--image_sizes", "big"]),
        (["--config=digits", "--config.method.mask_ration=0.5"], ["mask_ration", "mask_ratio"]),
        (["--json=nowhere/cost.json"], ["--json", "nowhere"]),
    ],
)
def test_wrong_flags_are_one_line(monkeypatch, capsys, flags, words):
    line = refusal(capsys, call_tool, monkeypatch, "cost", *flags)
    assert all(word in line for word in words), line


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "digits_maskdm_pretrain"])
def test_xla_counts_the_same_products(monkeypatch, capsys, tmp_path, name):
    """And a little more: XLA counts every operation, the optimizer's and the EMA's too."""
    options = {"training.batch_size": 128, "compute.precision": "float32"}
    flags = [*tiny_flags(options, name), "--check", f"--json={tmp_path / 'cost.json'}"]
    call_tool(monkeypatch, "cost", *flags)
    check = json.loads((tmp_path / "cost.json").read_text())["check"]
    assert 1 < check["xla_flops"] / check["product_flops"] < 1.15
    assert "XLA" in capsys.readouterr().out.splitlines()[-1]
