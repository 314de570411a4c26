"""What Python sees: a trained model from the folder of a run or an import."""

from pathlib import Path

import jax

from maskdit_jax.config import ConfigDict
from maskdit_jax.data.vae import open_codec
from maskdit_jax.distributed.mesh import make_mesh
from maskdit_jax.errors import UserError
from maskdit_jax.models.compute import PRECISIONS
from maskdit_jax.sampling import Model, Origin
from maskdit_jax.training.checkpoint import open_run
from maskdit_jax.training.meta import WEIGHTS


def load(
    path: str | Path,
    weights: str = "ema",
    *,
    step: int | None = None,
    precision: str | None = None,
    vae: str | Path | None = None,
) -> Model:
    """A checkpoint of a run folder, or an import, as a Model.

    Args:
      path: folder of a run, or one that `import_torch` made.
      weights: "ema" or "params", the raw weights.
      step: of the steps that are there; by default the newest healthy one.
      precision: of compute, bfloat16, tf32 or float32; by default the run's.
      vae: the latents' autoencoder, with which `sample` gives images; by default the run's, "" for none.

    Raises:
      UserError: there is no such checkpoint or autoencoder, it does not fit, or the step is damaged.
    """
    for name, value, choices in (("weights", weights, WEIGHTS), ("precision", precision, PRECISIONS)):
        if value is not None and value not in choices:
            raise UserError(f"{name}={value!r} is unknown; known: {', '.join(choices)}")
    checkpoints, mesh = open_run(path), make_mesh(jax.device_count(), 1)
    step, meta, params = checkpoints.healthy(
        step, lambda step, meta: checkpoints.restore_weights(step, meta, weights, mesh)
    )
    checkpoints.close()
    config = ConfigDict(meta["config"])
    config.compute.precision = precision or config.compute.precision
    data, precision = config.data, config.compute.precision
    try:
        chosen = config.get("vae") if vae is None else vae  # an import has none
        codec = open_codec(data.space, data.latent_scale, data.channels, chosen, precision)
    except UserError as error:
        remedy = "it is the run's own: give another place of it as vae (--vae=FOLDER), or vae='' for latents"
        raise UserError(f"{error}; {remedy}" if vae is None else str(error)) from None
    origin = Origin(Path(path), step, weights)
    return Model(config, params, mesh, codec, origin, meta.get("class_names", ()))


def other_weights(model: Model, weights: str) -> Model:
    """The same step of the same run with its other weights, "ema" or "params".

    Raises:
      UserError: the model was not loaded from a folder, or the folder has gone on since.
    """
    if model.origin is None:
        raise UserError("this model was not loaded from a folder: it has one set of weights")
    if weights == model.origin.weights:
        return model
    origin = model.origin._replace(weights=weights)
    checkpoints = open_run(origin.workdir)
    if origin.step not in checkpoints.steps:
        raise UserError(f"{origin.workdir} no longer holds step {origin.step:,}: load it anew")
    meta = checkpoints.meta(origin.step)
    params = checkpoints.restore_weights(origin.step, meta, weights, model.mesh)
    checkpoints.close()
    return Model(model.config, params, model.mesh, model.codec, origin, model.class_names)
