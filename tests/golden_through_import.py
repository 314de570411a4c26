"""Script: one golden case through the public API alone, from the authors' layout to outputs, losses, samples.

In a process of its own, with one device: each of the tests' eight would hold a copy of the weights.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from golden_case import GOLDEN, Case, assert_close_to_rms, channels_last

from maskdit_jax import import_torch, load
from maskdit_jax.diffusion.edm import precondition


def main(name: str) -> None:
    case = Case(name)
    family = "MaskDiT" if case.network.use_decoder else "DiT"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / "imported"
        expected = {"image_size": case.data.image_size, "num_classes": case.data.num_classes}
        import_torch(case.tensors(), folder, model=f"{family}-{case.network.size}", **expected)
        model = load(folder)
    assert model.method.network == case.network

    draws = case.draws
    denoised = np.asarray(model(draws.noisy, draws.sigma, draws.labels))
    assert_close_to_rms(denoised, case["eval_D"])
    error = np.square(denoised - case["y0"]).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(case["loss_weight"] * error, case["loss_nomask"], rtol=1e-4)
    if "cfg_scale" in case.info and "eval_D_cfg" in case.arrays:
        labels = case.labels("class_index_cfg")
        guided = model(draws.noisy, draws.sigma, labels, cfg_scale=case.info["cfg_scale"])
        assert_close_to_rms(guided, case["eval_D_cfg"])
        assert_close_to_rms(model(draws.noisy, draws.sigma, labels), case["eval_D_cfg_cond"])

    @jax.jit
    def masked(params, draws):
        network = nnx.merge(case.graphdef, params)
        loss, terms = model.method.loss(network, draws)
        denoised = precondition(network, model.method.sigma_data)(*draws[1:])
        return denoised, {"total": loss, **terms}

    outputs, terms = masked(model.params, draws)
    assert_close_to_rms(outputs, case["train_D"])
    for key, term in (("total", "total"), ("denoise", "denoise_loss"), ("mae", "mae_loss")):
        np.testing.assert_allclose(terms[term], case[f"loss_{key}"], rtol=1e-4, err_msg=key)

    if name == "maskdit_s2_32":
        golden = np.load(GOLDEN / "sample_s2_cfg.npz")
        noise, labels = channels_last(golden["latents"]), golden["class_index"]
        samples = model.sample([0, 1], labels, noise=noise, batch_size=2, num_steps=8, cfg_scale=1.5)
        assert_close_to_rms(samples, channels_last(golden["x_final"]), 1e-4)


if __name__ == "__main__":
    main(sys.argv[1])
