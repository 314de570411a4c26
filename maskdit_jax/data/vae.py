"""The autoencoder between images and latents: read from its published files, run over all devices."""

import functools
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from maskdit_jax.data.codec import Codec
from maskdit_jax.distributed.mesh import batch_sharding, make_mesh, repeat_to, to_mesh, whole_sharding
from maskdit_jax.errors import UserError, shown
from maskdit_jax.files import read_json
from maskdit_jax.interop import autoencoder as names
from maskdit_jax.interop.torch_io import as_float32, check_shapes, read_file, shapes_of
from maskdit_jax.log import log
from maskdit_jax.models.autoencoder import AutoencoderKL
from maskdit_jax.models.compute import PRECISIONS

# Pixels that a device works on at a time; an image more than these is a batch of its own.
PIXELS_AT_ONCE = 4 * 512**2
CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
PUBLISHED_SCALE = 0.18215  # of the latents of Stable Diffusion's autoencoder
# Our options by what diffusers calls them.
_SAME_IN_CONFIG = {
    "in_channels": "image_channels",
    "out_channels": "image_channels",
    "latent_channels": "latent_channels",
    "block_out_channels": "block_out_channels",
    "layers_per_block": "layers_per_block",
}
# What AutoencoderKL can be configured to, and this one always is.
_FIXED = {"act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None}


class AutoencoderFile(NamedTuple):
    """options: arguments of `AutoencoderKL`; latent_scale: what its latents are published to be scaled by;
    sha256: of the file of weights."""

    options: dict[str, Any]
    params: dict[str, Any]
    latent_scale: float
    sha256: str


def load_autoencoder(path: str | Path, precision: str = "float32") -> "Autoencoder":
    """The Stable Diffusion autoencoder from a diffusers folder or a file such as autoencoder_kl.pth.

    Its sums are float32; with a `precision` other than float32 its products are tf32 on a GPU.

    Raises:
      UserError: nothing there (the message names the public ones), or it is another network.
    """
    return Autoencoder(_read(path), precision)


def open_codec(
    space: str, latent_scale: float, channels: int, vae: str | Path | None, precision: str
) -> Codec:
    """The codec of a model that sees `channels` channels, with the autoencoder at `vae` if it is given.

    Raises:
      UserError: there is no such autoencoder, or it is none for this model.
    """
    if not vae:
        return Codec(space, latent_scale)
    if space != "latents":
        raise UserError("vae: this run's model makes pixels, there is nothing to decode")
    autoencoder = load_autoencoder(vae, precision)
    if autoencoder.channels != channels:
        raise UserError(
            f"vae: the autoencoder's latents have {autoencoder.channels} channels, the model's {channels}"
        )
    if not math.isclose(autoencoder.latent_scale, latent_scale, rel_tol=1e-3):
        log.warning(
            f"warning: the autoencoder is published with the scale {autoencoder.latent_scale:g}, the model "
            f"was trained with data.latent_scale={latent_scale:g}: is it the right one?"
        )
    return Codec(space, latent_scale, autoencoder)


class Autoencoder:
    """Images ↔ moments and raw latents, over all devices, a few images at a time on each.

    factor: an image has `factor` times as many pixels per side as its latents.
    """

    def __init__(self, file: AutoencoderFile, precision: str = "float32"):
        matmul_precision = PRECISIONS["float32" if precision == "float32" else "tf32"][1]
        network = nnx.eval_shape(
            lambda: AutoencoderKL(**file.options, matmul_precision=matmul_precision, rngs=nnx.Rngs(0))
        )
        self._graphdef = nnx.split(network)[0]
        self.mesh = make_mesh(jax.device_count(), 1)
        self.params = jax.tree.map(lambda x: to_mesh(x, whole_sharding(self.mesh)), file.params)
        self.sha256 = file.sha256
        self.latent_scale, self.channels = file.latent_scale, file.options["latent_channels"]
        self.factor = 2 ** (len(file.options["block_out_channels"]) - 1)

    def encode(self, images: jax.Array) -> jax.Array:
        """Moments [n, H/f, W/f, 2C] (mean, log-variance), not scaled, of images [n, H, W, 3] in [-1, 1]."""
        height, width = images.shape[1:3]
        if height % self.factor or width % self.factor:
            raise UserError(f"images of {height}×{width} pixels: both sides must divide by {self.factor}")
        return self._apply("encode", images, height * width)

    def decode(self, raw_latents: jax.Array) -> jax.Array:
        """Images [n, H, W, 3], about [-1, 1], of raw latents [n, H/f, W/f, C]: latents / latent_scale."""
        height, width = raw_latents.shape[1:3]
        return self._apply("decode", raw_latents, height * width * self.factor**2)

    def _apply(self, method: str, x: jax.Array, pixels: int) -> jax.Array:
        devices, count = self.mesh.size, len(x)
        filled = repeat_to(x, -(-count // devices) * devices)
        out = _apply_in_chunks(
            self.params,
            jax.device_put(filled, batch_sharding(self.mesh)),
            graphdef=self._graphdef,
            method=method,
            at_once=max(PIXELS_AT_ONCE // pixels, 1),
            mesh=self.mesh,
        )
        return out[:count]


@functools.partial(jax.jit, static_argnames=("graphdef", "method", "at_once", "mesh"))
def _apply_in_chunks(params, x, *, graphdef, method, at_once, mesh):
    def on_one_device(params, x):
        network, count = nnx.merge(graphdef, params), len(x)
        size = max(n for n in range(1, at_once + 1) if count % n == 0)
        chunks = x.reshape(count // size, size, *x.shape[1:])
        out = jax.lax.map(getattr(network, method), chunks)
        return out.reshape(count, *out.shape[2:])

    batch, whole = batch_sharding(mesh).spec, PartitionSpec()
    return jax.shard_map(on_one_device, mesh=mesh, in_specs=(whole, batch), out_specs=batch)(params, x)


def _read(path: str | Path) -> AutoencoderFile:
    weights, config = _find(Path(path))
    content: Mapping[Any, Any] = read_file(weights)
    if isinstance(nested := content.get("state_dict"), Mapping):
        content = nested
    shapes_of(content, str(weights), weights.stat().st_size)
    try:
        tensors = names.rename(as_float32(content, str(weights)))
        options = names.read_options({name: x.shape for name, x in tensors.items()})
    except KeyError as error:
        raise UserError(f"{weights} is no AutoencoderKL: it has no {error.args[0]}") from None
    except ValueError as error:
        raise UserError(f"{weights} is no AutoencoderKL: {error}") from None
    options["norm_num_groups"] = groups = config.get("norm_num_groups", 32)
    widths = options["block_out_channels"]
    if type(groups) is not int or groups < 1 or any(width % groups for width in widths):
        raise UserError(f"{weights}: norm_num_groups={shown(groups)} must divide the widths {widths}")
    _compare_with_config(options, config, weights)

    def expected_tensors():
        params = nnx.to_pure_dict(nnx.split(AutoencoderKL(**options, rngs=nnx.Rngs(0)))[1])
        return names.to_torch(params)

    expected = jax.eval_shape(expected_tensors)
    check_shapes(
        {name: x.shape for name, x in tensors.items()},
        {name: x.shape for name, x in expected.items()},
        str(weights),
        "AutoencoderKL",
    )
    with weights.open("rb") as content_bytes:
        sha256 = hashlib.file_digest(content_bytes, "sha256").hexdigest()
    return AutoencoderFile(options, names.from_torch(tensors), config["scaling_factor"], sha256)


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of weights at a path that a user gives, and what its configuration says."""
    if path.is_file():
        return path, {"scaling_factor": PUBLISHED_SCALE}
    for weights in (path / name for name in WEIGHTS):
        if weights.is_file() and (path / CONFIG).is_file():
            return weights, _read_config(path / CONFIG)
    raise UserError(
        f"no autoencoder in {path}: expected {CONFIG} and {WEIGHTS[0]}, as in the public models "
        "stabilityai/sd-vae-ft-ema and stabilityai/sd-vae-ft-mse (hf download "
        f"stabilityai/sd-vae-ft-ema --local-dir {path}), or a file such as autoencoder_kl.pth"
    )


def _read_config(file: Path) -> dict[str, Any]:
    config = {"scaling_factor": PUBLISHED_SCALE} | read_json(file)
    for name, value in _FIXED.items():
        if config.get(name, value) != value:
            raise UserError(f"{file}: {name}={shown(config[name])} is not supported, only {value!r}")
    scale = config["scaling_factor"]
    # Written so that NaN is refused too; a whole number may be too long for a float.
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 1e-6 <= scale <= 1e6:
        raise UserError(f"{file}: scaling_factor={shown(scale)}, expected a number such as {PUBLISHED_SCALE}")
    return config


def _compare_with_config(options: dict[str, Any], config: dict[str, Any], weights: Path) -> None:
    """The tensors decide; a configuration that says otherwise is another network's."""
    for theirs, ours in _SAME_IN_CONFIG.items():
        found = list(options[ours]) if ours == "block_out_channels" else options[ours]
        if config.get(theirs, found) != found:
            raise UserError(
                f"{weights}: {CONFIG} beside it says {theirs}={shown(config[theirs])}, its tensors {found}"
            )
