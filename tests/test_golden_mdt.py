"""Parity of MDT and MDTv2 with the authors' implementation: masks, network, guidance, losses, names."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import GOLDEN
from golden_dit import LATENTS
from golden_maskdm import assert_close, seeded_tensor
from golden_mdt import LAYOUT, mdt_case, mdt_of, tensor_shapes

from maskdit_jax.diffusion.ddpm import timestep_of
from maskdit_jax.diffusion.guidance import Growth, guide, null_label_sides
from maskdit_jax.methods.mdt import MDTDraws
from maskdit_jax.models.masking import count_kept, random_mask
from maskdit_jax.models.mdt import UNUSED_ROWS, distance_bias, visible_tokens

VERSIONS = [1, 2]
GRID = 16
TABLE = {1: "blocks.0", 2: "en_inblocks.0"}  # of the first block


def golden_mask(case):
    num_keep = int(case["len_keep"])
    assert num_keep == count_kept(GRID**2, float(case["mask_ratio_used"]))
    return random_mask(jnp.asarray(case["mask_noise"]), num_keep)


@pytest.mark.parametrize("version", VERSIONS)
def test_masks_and_biases_of_distances(version):
    case = mdt_case(version)
    mask = golden_mask(case)
    np.testing.assert_array_equal(mask.keep_ids, case["ids_keep"])
    np.testing.assert_array_equal(mask.restore_ids, case["ids_restore"])
    np.testing.assert_array_equal(mask.hidden, case["mask"])
    if version == 2:
        ratio = case.method.mask_ratio + case.method.mask_ratio_spread * case["ratio_draw"]
        assert ratio == pytest.approx(case["mask_ratio_used"])

    key = f"{TABLE[version]}.attn.rel_pos_bias.relative_position_bias_table"
    table = seeded_tensor(key, ((2 * GRID - 1) ** 2 + UNUSED_ROWS, 6))[:-UNUSED_ROWS]
    ((first, second), *_) = (distance_bias(table, GRID, None)[0][h] for h in (slice(0, 2),))
    np.testing.assert_array_equal(first[0], case["rel_bias_head0_row0"])
    np.testing.assert_array_equal(second[37], case["rel_bias_head1_row37"])
    index = LAYOUT.fixed_tensors(case.method.network, LATENTS)[f"{TABLE[version]}.{LAYOUT.INDEX}"]
    np.testing.assert_array_equal(index[:5, :40], case["rel_index_corner"])


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_outputs_and_guidance(version):
    """All tokens; those kept, and what is made of them; three channels guided, by a scale that grows."""
    case = mdt_case(version)
    levels = case.method.noise_levels()

    @jax.jit
    def run(params, x, t, labels, mask, guided_x, guided_t, guided_labels):
        network = case.network(params)

        def predict(x, sigma, labels):
            return network(x, timestep_of(sigma, levels), labels)

        guided = guide(null_label_sides(predict), float(case["cfg_scale"]), 3, Growth(4, levels))
        return {
            "out_full": network(x, t, labels),
            "out_masked": network(x, t, labels, mask),
            "tokens_kept_head": visible_tokens(network.embed(x), mask)[:, :4],
            "cfg_out": guided(guided_x, jnp.asarray(levels, jnp.float32)[guided_t], guided_labels),
        }

    half = {name: case[f"cfg_{name}"][:2] for name in ("x", "t", "y")}
    outputs = run(case.params, case["x"], case["t"], case["y"], golden_mask(case), *half.values())
    for name in ("out_full", "out_masked", "tokens_kept_head"):
        assert_close(outputs[name], case[name], 1e-5 if "tokens" in name else 2e-5)
    # Theirs has rows for both sides, and what is guided in both.
    assert_close(outputs["cfg_out"], case["cfg_out"][:2], 2e-5)
    assert_close(outputs["cfg_out"][..., :3], case["cfg_out"][2:, ..., :3], 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_losses_and_gradients_of_a_training_step(version):
    """Of both passes; the norm of every tensor's gradient, and two tensors' value by value."""
    case = mdt_case(version)
    labels = case["loss/y"]
    draws = MDTDraws(
        clean=case["loss/x0"],
        t=jnp.asarray(case["loss/t"], jnp.int32),
        noise_full=case["loss/noise_full"],
        noise_masked=case["loss/noise_masked"],
        labels_full=labels,
        labels_masked=labels,
        mask=golden_mask(case),
    )

    @jax.jit
    def run(params, draws):
        def mean_loss(params):
            loss, terms = case.method.loss(case.network(params), draws)
            return loss.mean(), terms

        return jax.value_and_grad(mean_loss, has_aux=True)(params)

    (loss, terms), gradient = run(case.params, draws)
    np.testing.assert_allclose(loss, case["loss/loss"], rtol=2e-5)
    for prefix, of_pass in (("", "full"), ("masked_", "masked")):
        assert_close(terms[f"{prefix}denoise_loss"], case[f"loss/{of_pass}_mse"], 2e-5)
        assert_close(terms[f"{prefix}variance_loss"], case[f"loss/{of_pass}_vb"], 2e-5)
    fixed = LAYOUT.fixed_tensors(case.method.network, LATENTS)
    tensors = LAYOUT.to_torch(jax.device_get(gradient), case.method.network, LATENTS)
    gradient = {key: np.asarray(x) for key, x in tensors.items() if key not in fixed}
    expected = case.info["s2_loss"]["grad_norms"]
    assert set(gradient) == set(expected)
    norms = {key: float(np.linalg.norm(value)) for key, value in gradient.items()}
    for key, norm in expected.items():
        np.testing.assert_allclose(norms[key], norm, rtol=1e-4, err_msg=key)
    np.testing.assert_allclose(np.linalg.norm(list(norms.values())), case["loss/grad_global_norm"], rtol=2e-5)
    assert_close(gradient["mask_token"], case["loss/grad_mask_token"], 2e-5)
    side = gradient["sideblocks.0.attn.rel_pos_bias.relative_position_bias_table"]
    assert_close(side[:64], case["loss/grad_rel_bias_side"], 2e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_loss_terms_at_eight_timesteps(version):
    """Of a network in closed form, in both passes the same; version 2 weighs the noise's error."""
    case = mdt_case(version)

    def network(x, t, labels, mask):
        t = t[:, None, None, None]
        return jnp.concatenate([jnp.tanh(0.5 * x + 0.001 * t), 0.5 * jnp.sin(x + 0.002 * t)], axis=-1)

    clean, noise, t = (jnp.asarray(case[f"terms/{name}"]) for name in ("x0", "noise", "t"))
    draws = MDTDraws(clean, t.astype(jnp.int32), noise, noise, t, t, None)
    loss, terms = jax.jit(lambda draws: case.method.loss(network, draws))(draws)
    for prefix in ("", "masked_"):
        assert_close(terms[f"{prefix}denoise_loss"], case["terms/term_mse"], 1e-5)
        assert_close(terms[f"{prefix}variance_loss"], case["terms/term_vb"], 1e-5)
    assert_close(loss, 2 * case["terms/term_loss"], 1e-5)
    weight = case["terms/term_mse"] / case["terms/plain_squared_error"]
    assert (weight == 1).all() if version == 1 else weight.min() < 0.01


@pytest.mark.parametrize("version", VERSIONS)
def test_names_and_shapes_of_the_published_networks_are_the_authors(version):
    """All of XL/2, and what is read of its shapes; the number of parameters of all sizes."""
    entries = json.loads((GOLDEN / f"mdtv{version}_xl2_keys.json").read_text())
    method = mdt_of("XL/2", version)
    shapes = tensor_shapes(method)
    assert shapes == {entry["key"]: tuple(entry["shape"]) for entry in entries}
    found = LAYOUT.read_options(shapes)
    assert found == {"network": vars(method.network), "data": LATENTS._asdict()}
    assert LAYOUT.model_name(method.network) == ("MDT-XL/2" if version == 1 else "MDTv2-XL/2")
    fixed = LAYOUT.fixed_tensors(method.network, LATENTS)
    assert set(fixed) == {entry["key"] for entry in entries if not entry["trainable"]}
    assert {str(x.dtype) for x in fixed.values()} == {"int64"}
    for name, counts in mdt_case(version).info["param_counts_256"].items():
        network = mdt_of(name.split("_")[1] + "/2", version)
        assert network.network.decoder_depth == counts["decode_layer"]
        learned = {k: x for k, x in tensor_shapes(network).items() if not k.endswith(LAYOUT.INDEX)}
        assert sum(np.prod(shape) for shape in learned.values()) == counts["params"]
