"""MDT's weights through the public API: from the authors' names to its noise, and out again."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden_maskdm import assert_close, seeded_tensor
from golden_mdt import LAYOUT, mdt_case, tensor_shapes
from safetensors.numpy import load_file
from test_interop_maskdm import assert_same_tensors

from maskdit_jax import UserError, export_torch, import_torch, load
from maskdit_jax.interop import layout_of
from maskdit_jax.methods.mdt import MDT, MDTNetwork
from maskdit_jax.methods.method import Shape

pytestmark = pytest.mark.usefixtures("messages")
SMALL = Shape(image_size=4, channels=1, num_classes=2)


def small_tensors(version: int) -> dict[str, np.ndarray]:
    """Of a network of five blocks, of version 1 three of them in the decoder."""
    decoder_depth = 3 if version == 1 else 1
    numbers = {"hidden_size": 8, "depth": 5, "num_heads": 2, "patch_size": 2, "decoder_depth": decoder_depth}
    method = MDT(network=MDTNetwork(size="custom", version=version, **numbers))
    fixed = LAYOUT.fixed_tensors(method.network, SMALL)
    shapes = tensor_shapes(method, SMALL)
    return {key: fixed[key] if key in fixed else seeded_tensor(key, s) for key, s in shapes.items()}


def assert_same_types(actual, expected) -> None:
    assert_same_tensors(actual, expected)
    assert {key: x.dtype for key, x in actual.items()} == {key: x.dtype for key, x in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_golden_weights_in_predict_the_golden_noise_and_out_are_the_same(version, tmp_path):
    """With the index tables, int64; imported, it has the options and the sampler that were published."""
    case = mdt_case(version)
    name = "MDT-S/2" if version == 1 else "MDTv2-S/2"
    import_torch(case.tensors, tmp_path / "imported", model=name, image_size=32, num_classes=1000)
    model = load(tmp_path / "imported")
    assert model.method == case.method
    assert model.sampler_options() == MDT.sampler
    # D(x, sigma) = x - sigma·eps, where x is the golden's input times √(1 + sigma²).
    sigma = model.method.noise_levels()[case["t"]].astype(np.float32)
    scale = sigma[:, None, None, None]
    x = case["x"] * np.sqrt(1 + scale**2)
    denoised = model(jnp.asarray(x), jnp.asarray(sigma), jnp.asarray(case["y"]))
    assert_close((x - denoised) / scale, case["out_full"][..., :4], 1e-4)

    export_torch(model, tmp_path / "out/model.safetensors")
    assert_same_types(load_file(tmp_path / "out/model.safetensors"), case.tensors)
    assert "13 of int64" in (tmp_path / "out/MODEL_CARD.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_small_networks_there_and_back_keep_every_bit_and_what_tensors_do_not_tell(version, tmp_path):
    """As .pt; how many blocks version 1 has in the decoder is in the config.json beside it."""
    tensors = small_tensors(version)
    import_torch(tensors, tmp_path / "imported")
    model = load(tmp_path / "imported")
    assert model.method.network.num_heads == 2
    if version == 1:
        assert model.method.network.decoder_depth == 2  # as published
        with model.config.unlocked():
            model.config.method.network.decoder_depth = 3
        model.method = dataclasses.replace(
            model.method, network=dataclasses.replace(model.method.network, decoder_depth=3)
        )
        model.params = LAYOUT.from_torch(tensors, model.method.network)
        suffix = "safetensors"
    else:
        suffix = "pt"
    export_torch(model, tmp_path / f"out/model.{suffix}")
    if version == 1:
        written = load_file(tmp_path / "out/model.safetensors")
    else:
        written = torch.load(tmp_path / "out/model.pt", weights_only=True)["ema"]
        written = {key: x.numpy() for key, x in written.items()}
    assert_same_types(written, tensors)
    import_torch(tmp_path / f"out/model.{suffix}", tmp_path / "again")
    assert load(tmp_path / "again").method == model.method


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, index: t.update({index: t[index][::-1]}), "is not the fixed index table"),
        (lambda t, index: t.update(mask_token=np.zeros((1, 1, 8), int)), "mask_token (int64)) is neither"),
        (lambda t, index: t.update({index: np.zeros((9, 9), np.int64)}), "is not that of 2×2 patches"),
        (lambda t, index: t.pop("sideblocks.0.attn.qkv.bias"), "1 missing: sideblocks.0.attn.qkv.bias"),
        (lambda t, index: t.update({"blocks.1.skip": np.zeros(8, np.float32)}), "1 unexpected: blocks"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change, words, tmp_path):
    tensors = small_tensors(1)
    change(tensors, f"sideblocks.0.{LAYOUT.INDEX}")
    with pytest.raises(UserError) as error:
        import_torch(tensors, tmp_path / "imported")
    assert words in str(error.value)
    assert not (tmp_path / "imported").exists()


def test_a_dit_and_an_mdt_are_told_apart_by_their_tensors():
    shapes = {key: x.shape for key, x in mdt_case(1).tensors.items()}
    plain = {
        key: s for key, s in shapes.items() if not ("side" in key or "rel_pos" in key or "decoder" in key)
    }
    names = ("maskdit", "maskdm", "dit", "mdt")
    assert [layout_of(name).recognises(shapes) for name in names] == [False, False, False, True]
    assert [layout_of(name).recognises(plain) for name in names] == [False, False, True, False]
