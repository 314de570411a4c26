"""The latents' autoencoder: goldens, the published layouts, work in portions, and samples as pixels."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as TorchAutoencoder
from flax import nnx
from golden_case import GOLDEN, assert_close_to_rms, channels_last, seeded_tensor
from jax.sharding import AxisType
from PIL import Image
from safetensors.numpy import load_file, save_file

import maskdit_jax
from maskdit_jax import UserError, import_torch, load_autoencoder, main, sample
from maskdit_jax.config import resolve
from maskdit_jax.config_file import load
from maskdit_jax.data.images import to_uint8
from maskdit_jax.data.shards import finish_shards, read_report, write_shard
from maskdit_jax.data.vae import PIXELS_AT_ONCE, Autoencoder, _apply_in_chunks, open_codec
from maskdit_jax.interop.maskdit import to_torch
from maskdit_jax.methods.maskdit import MaskDiT, MaskDiTNetwork
from maskdit_jax.methods.method import Shape, init_params
from maskdit_jax.models.autoencoder import AutoencoderKL
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.embed import position_table

ROOT = Path(__file__).parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "vae.npz"))


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_as_users_do")
@pytest.mark.parametrize("weights", ["rule", "unitnorm"])
def test_published_autoencoder_against_goldens(weights, golden, tmp_path):
    """autoencoder_kl.pth layout, full size: moments, decoded image, uint8; and the latents' scale."""
    keys = json.loads((GOLDEN / "vae_keys.json").read_text())["state_dict"]
    tensors = {key: seeded_tensor(key, tuple(shape)) for key, shape in keys}
    if weights == "unitnorm":
        tensors = {k: v + 1 if v.ndim == 1 and k.endswith("weight") else v for k, v in tensors.items()}
    total = sum(float(v.sum(dtype=np.float64)) for v in tensors.values())
    np.testing.assert_allclose(
        total, {"rule": 137.33923557762694, "unitnorm": 19977.33923468145}[weights], rtol=1e-9
    )
    torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, tmp_path / "autoencoder_kl.pth")
    autoencoder = load_autoencoder(tmp_path / "autoencoder_kl.pth")
    assert (autoencoder.factor, autoencoder.channels, autoencoder.latent_scale) == (8, 4, 0.18215)
    moments = autoencoder.encode(channels_last(golden["image"]))
    assert_close_to_rms(moments, channels_last(golden[f"{weights}__moments"]))
    decoded = autoencoder.decode(channels_last(golden["latent"]) / autoencoder.latent_scale)
    assert_close_to_rms(decoded, channels_last(golden[f"{weights}__decoded"]))
    assert np.abs(to_uint8(decoded).astype(int) - golden[f"{weights}__decoded_uint8"]).max() <= 1


@pytest.fixture(scope="module")
def diffusers_model() -> TorchAutoencoder:
    """A small autoencoder of diffusers with every parameter random."""
    torch.manual_seed(0)
    model = TorchAutoencoder(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=8,
        scaling_factor=0.25,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folder(diffusers_model, tmp_path_factory) -> Path:
    """The same as diffusers writes it."""
    path = tmp_path_factory.mktemp("vae") / "diffusers"
    diffusers_model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def autoencoder(folder) -> Autoencoder:
    return load_autoencoder(folder)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (5, 16, 16, 3)).astype(np.float32)


@pytest.mark.slow
def test_diffusers_folder_computes_what_diffusers_does(diffusers_model, autoencoder, images):
    with torch.no_grad():
        nchw = torch.from_numpy(images).permute(0, 3, 1, 2)
        posterior = diffusers_model.encode(nchw).latent_dist
        decoded = diffusers_model.decode(posterior.mode()).sample
    moments = autoencoder.encode(images)
    assert_close_to_rms(moments, channels_last(posterior.parameters.numpy()))
    assert_close_to_rms(autoencoder.decode(moments[..., :4]), channels_last(decoded.numpy()))
    assert (autoencoder.factor, autoencoder.channels, autoencoder.latent_scale) == (4, 4, 0.25)


@pytest.mark.slow
def test_older_diffusers_files_and_pickles_hold_the_same(folder, autoencoder, images, tmp_path):
    """Attention as older diffusers named and shaped it, in a .bin file."""
    tensors = load_file(folder / WEIGHTS)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        tensors = {k.replace(f".{new}.", f".{old}."): v for k, v in tensors.items()}
    assert any("proj_attn" in key for key in tensors)
    as_torch = {k: torch.from_numpy(v) for k, v in tensors.items()}
    torch.save(as_torch, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    moments = load_autoencoder(tmp_path).encode(images)
    np.testing.assert_array_equal(moments, autoencoder.encode(images))


@pytest.mark.slow
def test_any_number_of_images_in_any_portions(autoencoder, images):
    """Five images on eight devices, and sixteen in portions of one, are each the image alone."""
    whole = np.asarray(autoencoder.encode(images))
    assert whole.shape == (5, 4, 4, 8)
    for i in range(5):
        np.testing.assert_allclose(autoencoder.encode(images[i : i + 1])[0], whole[i], rtol=0, atol=1e-5)
    filled = jnp.asarray(np.resize(images, (32, 16, 16, 3)))
    at_once = {
        n: _apply_in_chunks(
            autoencoder.params,
            filled,
            graphdef=autoencoder._graphdef,
            method="encode",
            at_once=n,
            mesh=autoencoder.mesh,
        )
        for n in (1, 3, 4)
    }
    for moments in at_once.values():
        np.testing.assert_allclose(moments, np.resize(whole, moments.shape), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_as_users_do")
def test_decoding_a_large_batch_needs_the_memory_of_a_portion():
    """512 px with the published sizes, compiled from shapes: 64 images take no more than 8 do."""
    network = nnx.eval_shape(lambda: AutoencoderKL(rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(network)
    mesh = jax.make_mesh((1, 1), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=jax.devices()[:1])

    def temporary_bytes(count, at_once):
        latents = jax.ShapeDtypeStruct((count, 64, 64, 4), np.float32)
        options = {"graphdef": graphdef, "method": "decode", "at_once": at_once, "mesh": mesh}
        compiled = _apply_in_chunks.lower(nnx.to_pure_dict(params), latents, **options).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    portion = PIXELS_AT_ONCE // 512**2
    assert temporary_bytes(64, portion) <= temporary_bytes(8, portion) < 5e9
    assert temporary_bytes(8, 8) > 1.5 * temporary_bytes(8, portion)


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory) -> Path:
    """An imported model of latents 8×8×4, whose images the autoencoder of these tests makes 32 px wide."""
    network = MaskDiTNetwork("custom", hidden_size=32, depth=1, num_heads=4, patch_size=2, use_decoder=False)
    data = Shape(image_size=8, channels=4, num_classes=10)
    params = jax.eval_shape(lambda: init_params(MaskDiT(network=network), data, Compute(), 0))
    shapes = jax.eval_shape(lambda p: to_torch(p, network, data), params)
    tensors = {k: seeded_tensor(k, x.shape) for k, x in shapes.items()}
    tensors["model.pos_embed"] = position_table(32, 4)[None]
    path = tmp_path_factory.mktemp("latent") / "imported"
    import_torch(tensors, path, num_heads=4)
    return path


@pytest.mark.slow
def test_sample_decodes_to_pixels_with_vae(latent_model, folder, autoencoder, tmp_path, caplog, capsys):
    options = {"num_steps": 2, "solver": "euler", "cfg_scale": 1.0}
    flags = [f"--{name}={value}" for name, value in options.items()] + [f"--workdir={latent_model}"]
    sample.main([*flags, "--seeds=0-4", f"--out={tmp_path / 'pixels'}", f"--vae={folder}"])
    assert "published with the scale 0.25" in capsys.readouterr().out
    latents = maskdit_jax.load(latent_model).sample(range(5), **options)
    assert latents.shape == (5, 8, 8, 4)
    expected = to_uint8(autoencoder.decode(latents / np.float32(0.18215)))
    for seed in range(5):
        with Image.open(tmp_path / "pixels/000000" / f"{seed:06d}.png") as png:
            assert np.abs(np.asarray(png, int) - expected[seed]).max() <= 1
    assert (tmp_path / "pixels/grid.png").is_file()
    sample.main([*flags, "--seeds=0-4", f"--out={tmp_path / 'latents'}"])
    assert sorted(p.name for p in (tmp_path / "latents").iterdir()) == ["samples.json", "samples.npz"]


@pytest.mark.slow
def test_training_shows_pixels_when_the_config_names_an_autoencoder(folder, tmp_path):
    moments = np.random.default_rng(0).standard_normal((16, 2, 8, 8, 8), np.float32)
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data", "all", moments, np.arange(16) % 2)
    reports = [read_report(tmp_path / "data", "all")]
    finish_shards(tmp_path / "data", reports, num_classes=2, latent_scale=0.25, about={})
    flags = f"""
        vae={folder} data.source=latents:{tmp_path / "data"} data.latent_scale=0.25
        data.image_size=8 data.num_classes=2 compute.precision=float32 method.mae_coef=0
        method.network.size=custom method.network.patch_size=4 method.network.hidden_size=32
        method.network.depth=1 method.network.num_heads=2 method.network.use_decoder=false
        training.num_steps=1 training.batch_size=8 sampling.num_steps=1 sampling.cfg_scale=1
        report.preview_columns=4 report.preview_steps=1 report.tensorboard=false
    """
    overrides = [f"--config.{flag}" for flag in flags.split()]
    main.main([f"--config={ROOT / 'configs/in256.py'}", f"--workdir={tmp_path / 'run'}", *overrides])
    for file in ("previews/step_00000001.png", "samples.png"):
        with Image.open(tmp_path / "run" / file) as png:  # 2 × 4 images of 32 pixels, enlarged
            assert (png.width, png.height) == ((4 * 33 + 1) * 4, (2 * 33 + 1) * 4)
            assert png.mode == "RGB"
    model = maskdit_jax.load(tmp_path / "run")
    assert model.sample([0], num_steps=1).shape == (1, 32, 32, 3)
    assert maskdit_jax.load(tmp_path / "run", vae="").sample([0], num_steps=1).shape == (1, 8, 8, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.conv_in.bias"), "1 missing: decoder.conv_in.bias"),
        (lambda t: t.update(x=np.zeros(1, np.float32)), "1 unexpected: x"),
        (lambda t: t.clear(), r"no AutoencoderKL: it has no encoder\.down_blocks\.0"),
        (
            lambda t: t.update({f"encoder.down_blocks.{i}.x": np.zeros(1, np.float32) for i in range(9)}),
            r"it has 9 of encoder\.down_blocks\.…, at most 8 are possible",
        ),
    ],
)
def test_what_is_no_autoencoder_is_refused_by_name(change, message, folder, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UserError, match=message) as refused:
        load_autoencoder(tmp_path)
    assert "\n" not in str(refused.value)


def test_images_that_the_autoencoder_cannot_halve_are_refused(autoencoder):
    with pytest.raises(UserError, match="both sides must divide by 4"):
        autoencoder.encode(np.zeros((1, 18, 16, 3), np.float32))


@pytest.mark.slow
def test_autoencoder_that_does_not_fit_the_model_is_refused(folder):
    with pytest.raises(UserError, match="makes pixels, there is nothing to decode"):
        open_codec("pixels", 0.18215, 1, folder, "float32")
    with pytest.raises(UserError, match="latents have 4 channels, the model's 8"):
        open_codec("latents", 0.18215, 8, folder, "float32")
    with pytest.raises(UserError, match=r"vae='x' decodes latents, but data\.space='pixels'"):
        resolve(load(ROOT / "configs/digits.py", ["--config.vae=x"]), device_count=8)
