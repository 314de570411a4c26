"""MaskDM's weights through the public API: from the authors' names to its noise, and out again."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from golden_maskdm import assert_close, maskdm_case
from safetensors.numpy import load_file

from maskdit_jax import UserError, export_torch, import_torch, load
from maskdit_jax.config import sampling_section
from maskdit_jax.exchange import CARD, CONFIG
from maskdit_jax.interop import layout_of
from maskdit_jax.methods import METHODS
from maskdit_jax.options import as_section

pytestmark = pytest.mark.usefixtures("messages")


def assert_same_tensors(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def test_every_method_of_the_package_has_a_table_of_names():
    assert all(layout_of(name) for name in METHODS)
    assert layout_of("no_method") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cond", "alt"])
def test_golden_weights_in_predict_the_golden_noise_and_out_are_the_same(name, tmp_path, caplog):
    case = maskdm_case(name)
    tensors, heads = case.tensors(), case.network.num_heads
    expected = {"image_size": 32, "num_classes": case.data.num_classes, "num_heads": heads}
    import_torch(tensors, tmp_path / "imported", model="MaskDM of 5 blocks of width 96", **expected)
    model = load(tmp_path / "imported")
    assert (model.config.method.name, model.config.data.space) == ("maskdm", "pixels")
    assert model.method.sampler.solver == model.config.sampling.solver == "ddim"
    assert vars(model.method.network) == vars(case.network) | {"size": "custom", "depth": 5}

    # D(x, sigma) = x - sigma·eps, where x is the golden's input times √(1 + sigma²).
    sigma = model.method.noise_levels()[case["t"]].astype(np.float32)
    scale = sigma[:, None, None, None]
    x = case["x"] * np.sqrt(1 + scale**2)
    denoised = model(jnp.asarray(x), jnp.asarray(sigma), jnp.asarray(case.labels))
    assert_close((x - denoised) / scale, case["out_full"], 1e-4)

    export_torch(model, tmp_path / "first/model.safetensors")
    assert_same_tensors(load_file(tmp_path / "first/model.safetensors"), tensors)
    card = (tmp_path / "first" / CARD).read_text()
    traits = ", biased queries and values, time through an MLP" if name == "alt" else ""
    ratio = 2 if name == "alt" else 4
    blocks = f"2 + 1 + 2 with long skips, width 96, {heads} heads, MLP {ratio} times as wide{traits}"
    for part in (f"| Blocks | {blocks} |", "DDPM of 1,000 timesteps, cosine", "arxiv.org/abs/2306.11363"):
        assert part in card
    assert "Latent scale" not in card
    import_torch(tmp_path / "first/model.safetensors", tmp_path / "again")
    export_torch(load(tmp_path / "again"), tmp_path / "second/model.safetensors")
    for file in ("model.safetensors", CARD, CONFIG):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


@pytest.mark.slow
def test_options_of_the_export_are_kept(tmp_path):
    """Of a .pt file with both sets; what tensors do not tell is in the config.json beside it."""
    tensors = maskdm_case("uncond").tensors()
    sets = {"model": tensors, "ema": {name: x + 1 for name, x in tensors.items()}}
    torch.save({n: {k: torch.tensor(x) for k, x in t.items()} for n, t in sets.items()}, tmp_path / "in.pt")
    import_torch(tmp_path / "in.pt", tmp_path / "imported", num_heads=4)
    model = load(tmp_path / "imported")
    with model.config.unlocked():
        model.config.method.update(noise_schedule="linear", mask_type="none")
        model.config.sampling.num_steps = 77
    export_torch(model, tmp_path / "out/model.pt")
    import_torch(tmp_path / "out/model.pt", tmp_path / "again")
    again = load(tmp_path / "again", "params")
    assert (again.method.noise_schedule, again.method.mask_type) == ("linear", "none")
    assert again.sampler_options().num_steps == 77
    written = torch.load(tmp_path / "out/model.pt", weights_only=True)
    for name, expected in sets.items():
        assert_same_tensors({key: x.numpy() for key, x in written[name].items()}, expected)


def test_what_does_not_fit_is_refused_by_name(tmp_path):
    tensors = maskdm_case("uncond").tensors()

    def refused(given=tensors, **options) -> str:
        with pytest.raises(UserError) as error:
            import_torch(given, tmp_path / "imported", **options)
        assert not (tmp_path / "imported").exists()
        return str(error.value)

    assert "tensors do not tell num_heads" in refused()
    assert "num_heads=5 does not divide the width 96" in refused(num_heads=5)
    assert "decoder_num_heads=2: MaskDM of 5 blocks" in refused(num_heads=4, decoder_num_heads=2)
    assert "model=MaskDiT-B/4 expected, MaskDM of 5 blocks" in refused(model="MaskDiT-B/4")
    short = tensors | {"encoder.encoder_pos_embed": np.zeros((1, 64, 96), np.float32)}
    assert "63 positions beside the extra tokens'" in refused(short, num_heads=4)
    patches = "encoder.patch_embed.proj.weight"
    without = {name: x for name, x in tensors.items() if name != patches}
    assert f"is no MaskDM: it has no {patches}" in refused(without)
    bias = "encoder.mid_block.attn.proj.bias"
    assert f"1 missing: {bias}" in refused({n: x for n, x in tensors.items() if n != bias}, num_heads=4)
    other = {name.replace("encoder", "unet"): x for name, x in tensors.items()}
    assert "is no MaskDiT or MaskDM or DiT or MDT: it has no model.x_embedder" in refused(other)


@pytest.mark.slow
def test_a_config_of_another_method_beside_the_file_is_refused(tmp_path):
    tensors = maskdm_case("uncond").tensors()
    import_torch(tensors, tmp_path / "imported", num_heads=4)
    export_torch(load(tmp_path / "imported"), tmp_path / "out/model.safetensors")
    method = METHODS["maskdit"]()
    about = json.loads((tmp_path / "out" / CONFIG).read_text())
    about["config"]["method"] = {"name": "maskdit", **as_section(method)}
    about["config"]["sampling"] = sampling_section(method.sampler)
    (tmp_path / "out" / CONFIG).write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"is a MaskDM, but the config\.json beside it says method\.name"):
        import_torch(tmp_path / "out/model.safetensors", tmp_path / "again")
