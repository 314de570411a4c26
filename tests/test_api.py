"""The Model object: denoising, guidance, and samples that depend on seed, label and options only."""

import copy
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType

from maskdit_jax import Model, UserError
from maskdit_jax.config import compute_of, method_of, resolve, shape_of
from maskdit_jax.config_file import load
from maskdit_jax.data.codec import Codec
from maskdit_jax.diffusion.solvers import SamplerOptions, integrate, sigma_grid
from maskdit_jax.methods.method import Shape, init_params, network_graph

ROOT = Path(__file__).parent.parent
SMALL = {
    "digits": """
    method.network.hidden_size=32 method.network.depth=1 method.network.num_heads=2
    method.network.decoder_hidden_size=16 method.network.decoder_depth=1 method.network.decoder_num_heads=2
    """.split(),
    "digits_maskdm_pretrain": """
    method.network.hidden_size=32 method.network.depth=3 method.network.num_heads=2
    """.split(),
}
NO_DECODER = ["method.network.use_decoder=false", "method.mae_coef=0"]
# Small programs, as compilation is what these tests wait for.
QUICK = {"num_steps": 3, "solver": "euler"}
# With churn every draw, not the first only, must be from the image's own seed.
GUIDED_AND_STOCHASTIC = {
    "digits": {"num_steps": 4, "solver": "euler", "cfg_scale": 1.5, "S_churn": 2.0},
    "digits_maskdm_pretrain": {"num_steps": 4, "cfg_scale": 1.5, "eta": 1.0},
}
SEEDS = [7, 0, 2**32 - 1, 3, 12, 25, 1, 4, 30, 2]
LABELS = [0, 1, 2, 3, 4, 5, 9, -1, 0, 9]


def network_of(config):
    """What decides a network and how it is computed."""
    return method_of(config), shape_of(config), compute_of(config)


def small_model(num_devices: int, options: list[str], recipe: str = "digits") -> Model:
    """A model of a recipe whose parameters are all random: a fresh one outputs zeros."""
    overrides = [f"--config.{option}" for option in SMALL[recipe] + options]
    config = resolve(load(ROOT / f"configs/{recipe}.py", overrides), device_count=num_devices)
    shapes = jax.eval_shape(lambda: init_params(*network_of(config), 0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), shapes)
    mesh = jax.make_mesh(
        (num_devices, 1), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=jax.devices()[:num_devices]
    )
    return Model(config, params, mesh, Codec("pixels", config.data.latent_scale))


@pytest.fixture(scope="module")
def model() -> Model:
    return small_model(1, NO_DECODER)


@pytest.fixture(scope="module")
def unconditional() -> Model:
    return small_model(1, [*NO_DECODER, "data.num_classes=0"])


@pytest.fixture(scope="module")
def noisy() -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [4, 8, 8, 1], sigma [4], labels [4] with one that is no class."""
    sigma = np.array([0.01, 0.4, 3.0, 60.0], np.float32)
    x = np.random.default_rng(1).standard_normal((4, 8, 8, 1), np.float32) * (
        0.5 + sigma[:, None, None, None]
    )
    return jnp.asarray(x), jnp.asarray(sigma), jnp.array([3, -1, 0, 9])


def denoise_by_hand(model: Model, x, sigma, labels) -> np.ndarray:
    """D = c_skip·x + c_out·F(c_in·x, ln(sigma) / 4, labels) (EDM, eq. 7), without the package's edm.py."""
    network = nnx.merge(network_graph(*network_of(model.config)), model.params)
    s, d = np.asarray(sigma, np.float64)[:, None, None, None], model.config.method.sigma_data
    scaled = jnp.asarray(np.asarray(x) / np.sqrt(s**2 + d**2), jnp.float32)
    prediction = np.asarray(jax.jit(network)(scaled, jnp.log(sigma) / 4, labels))
    assert prediction.std() > 0.05
    return np.asarray(x) * d**2 / (s**2 + d**2) + prediction * s * d / np.sqrt(s**2 + d**2)


def test_model_is_the_preconditioned_network(model, noisy):
    denoised = model(*noisy)
    assert denoised.shape == (4, 8, 8, 1)
    assert denoised.dtype == jnp.float32
    np.testing.assert_allclose(denoised, denoise_by_hand(model, *noisy), rtol=1e-4, atol=1e-5)


def test_label_changes_what_is_denoised(model, noisy):
    x, sigma, labels = noisy
    difference = np.abs(model(x, sigma, labels) - model(x, sigma, (labels + 1) % 10)).max(axis=(1, 2, 3))
    assert difference[1:].min() > 1e-2  # at the lowest sigma the image says it all


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 4.0])
def test_guided_is_unconditional_plus_scale_times_difference(model, noisy, scale):
    x, sigma, labels = noisy
    conditional, nothing = model(x, sigma, labels), model(x, sigma, jnp.full_like(labels, -1))
    guided = model(x, sigma, labels, cfg_scale=scale)
    np.testing.assert_allclose(guided, nothing + scale * (conditional - nothing), rtol=1e-4, atol=1e-5)
    if scale != 1:
        assert np.abs(guided - conditional).max() > 1e-2
    np.testing.assert_allclose(guided[1], conditional[1], rtol=1e-4, atol=1e-5)  # its label is no class


def test_sampling_at_cfg_scale_one_is_sampling_without_guidance(model):
    noise = [jax.random.normal(jax.random.fold_in(jax.random.key(s), 0), (8, 8, 1)) for s in SEEDS[:4]]
    sigmas, options = sigma_grid(QUICK["num_steps"]), SamplerOptions(**QUICK)
    expected = integrate(model, jnp.stack(noise), jnp.array(LABELS[:4]), sigmas, options)
    samples = model.sample(SEEDS[:4], LABELS[:4], batch_size=4, cfg_scale=1.0, **QUICK)
    assert samples.shape == (4, 8, 8, 1)
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, expected, rtol=0, atol=1e-5)


@functools.cache
def reference_samples(recipe: str) -> np.ndarray:
    assert jax.device_count() == 8
    return small_model(8, [], recipe).sample(SEEDS, LABELS, batch_size=64, **GUIDED_AND_STOCHASTIC[recipe])


@pytest.mark.parametrize(
    ("batch_size", "num_devices", "recipe"),
    [
        (7, 8, "digits"),
        *(
            pytest.param(*case, recipe, marks=pytest.mark.slow)
            for case in [(1, 1), (1, 8), (7, 1), (7, 8), (64, 1), (64, 8)]
            for recipe in SMALL
            if (*case, recipe) != (7, 8, "digits")
        ),
    ],
)
def test_image_is_the_same_at_any_batch_size_and_mesh(recipe, num_devices, batch_size):
    model = small_model(num_devices, [], recipe)
    assert model.mesh.size == num_devices
    samples = model.sample(SEEDS, LABELS, batch_size=batch_size, **GUIDED_AND_STOCHASTIC[recipe])
    assert np.isfinite(samples).all()
    np.testing.assert_allclose(samples, reference_samples(recipe), rtol=0, atol=1e-5)


def test_guidance_interval_decides_which_noise_levels_are_guided(model):
    def sample(**options):
        return model.sample(SEEDS[:4], LABELS[:4], batch_size=4, **QUICK, **options)

    everywhere, nowhere = sample(cfg_scale=1.5), sample(cfg_scale=1.0)
    assert np.abs(everywhere - nowhere).max() > 1e-2
    covers_all, covers_none = (0.001, 100.0), (100.0, 200.0)
    within = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(sample(cfg_scale=1.5, guidance_interval=covers_all), everywhere, **within)
    np.testing.assert_allclose(sample(cfg_scale=1.5, guidance_interval=covers_none), nowhere, **within)
    middle = sample(cfg_scale=1.5, guidance_interval=(0.1, 20.0))  # of 80, 2.5 and 0.002
    assert min(np.abs(middle - everywhere).max(), np.abs(middle - nowhere).max()) > 1e-4


@pytest.mark.slow
def test_weak_model_is_what_guidance_leads_away_from(model):
    """Another network and other weights, which is given the same labels."""
    weak = small_model(1, [*NO_DECODER, "method.network.hidden_size=16"])
    one_step = {"num_steps": 1, "solver": "euler", "noise": np.ones((2, 8, 8, 1), np.float32)}
    strong, alone = (m.sample([0, 1], [3, -1], cfg_scale=1.0, **one_step) for m in (model, weak))
    guided = model.sample([0, 1], [3, -1], cfg_scale=2.0, weak=weak, **one_step)
    np.testing.assert_allclose(guided, alone + 2 * (strong - alone), rtol=1e-4, atol=1e-4)
    assert np.abs(guided - model.sample([0, 1], [3, -1], cfg_scale=2.0, **one_step)).max() > 1e-2
    assert model.nfe(cfg_scale=2.0, weak=weak, **QUICK) == 2 * QUICK["num_steps"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"shape": (16, 1, 10)}, "the weak model has image_size 16, this one 8"),
        ({"shape": (8, 1, 0)}, "the weak model has num_classes 0, this one 10"),
        ({"codec": Codec("latents", 0.18215)}, "the weak model has space latents, this one pixels"),
        ({"mesh": jax.sharding.Mesh(jax.devices()[1:2], "data")}, "the weak model is on other devices"),
    ],
    ids=["image_size", "num_classes", "space", "mesh"],
)
def test_weak_model_of_other_data_is_refused(model, change, named):
    weak = copy.copy(model)
    for name, value in change.items():
        setattr(weak, name, Shape(*value) if name == "shape" else value)
    with pytest.raises(UserError, match=named) as refused:
        model.sample([0], weak=weak)
    assert "\n" not in str(refused.value)


def test_label_is_seed_modulo_classes_by_default(model):
    by_default = model.sample([3, 10, 25, 2**32 - 1], batch_size=4, **QUICK)
    given = model.sample([3, 10, 25, 2**32 - 1], [3, 0, 5, 5], batch_size=4, **QUICK)
    np.testing.assert_array_equal(by_default, given)
    assert model.check_labels([3, 10, 25, 2**32 - 1], None).tolist() == [3, 0, 5, 5]


def test_seed_and_label_decide_the_image(model):
    seeds, labels = [5, 6, 5, 5], [1, 1, 1, 2]
    a, other_seed, same, other_label = model.sample(seeds, labels, batch_size=4, **QUICK)
    np.testing.assert_allclose(a, same, rtol=0, atol=1e-5)
    assert np.abs(a - other_seed).max() > 1e-2
    assert np.abs(a - other_label).max() > 1e-2
    np.testing.assert_array_equal(
        model.sample(seeds, labels, batch_size=4, **QUICK), [a, other_seed, same, other_label]
    )


def test_unconditional_model_ignores_cfg_scale(unconditional, noisy):
    x, sigma, _ = noisy
    assert unconditional.sampler_options(cfg_scale=4.0).cfg_scale == 1
    assert unconditional.nfe(cfg_scale=4.0, **QUICK) == QUICK["num_steps"]
    plain = unconditional.sample([1, 2], batch_size=2, cfg_scale=1.0, **QUICK)
    np.testing.assert_array_equal(unconditional.sample([1, 2], batch_size=2, cfg_scale=4.0, **QUICK), plain)
    guided = unconditional(x, sigma, cfg_scale=4.0)
    np.testing.assert_allclose(guided, unconditional(x, sigma), rtol=1e-4, atol=1e-5)


def test_unconditional_model_knows_no_class_only(unconditional):
    assert unconditional.check_labels([5, 6], None).tolist() == [-1, -1]
    with pytest.raises(UserError, match="labels 0 … 0: the model knows -1, no class, only"):
        unconditional.sample([5], [0])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ({"cfg": 2.0}, ["'cfg' is unknown", "cfg_scale"]),
        ({"solver": "dpm"}, ["solver='dpm'", "heun", "euler"]),
        ({"num_steps": 0}, ["num_steps=0", "at least 1"]),
        ({"num_steps": 10_001}, ["num_steps=10001", "at most 10,000"]),
        ({"num_steps": 2.5}, ["num_steps=2.5", "a whole number"]),
        ({"rho": 1e-30}, ["rho=1e-30", "do not fall"]),
        ({"guidance_interval": (3, 3)}, ["guidance_interval=(3, 3)", "low < high"]),
        ({"guidance_interval": "all"}, ["guidance_interval='all'", "low < high"]),
        ({"batch_size": 10**12}, ["batch_size=1000000000000", "65,536"]),
        ({"labels": [10, 0]}, ["labels 0 … 10", "0 … 9", "-1"]),
        ({"labels": [-2, 0]}, ["labels -2 … 0", "0 … 9"]),
        ({"labels": [1, 2, 3]}, ["3 labels for 2 seeds"]),
        ({"labels": []}, ["0 labels for 2 seeds"]),
        ({"seeds": [0, -1]}, ["seeds", "from 0 to 4294967295"]),
        ({"seeds": [0, 2**32]}, ["seeds", "from 0 to 4294967295"]),
        ({"seeds": []}, ["seeds", "one or more"]),
        ({"seeds": [0.5, 1]}, ["seeds=[0.5, 1]", "whole numbers"]),
        ({"labels": [1.0, 2.0]}, ["labels=[1.0, 2.0]", "whole numbers"]),
        ({"labels": [True, False]}, ["labels=[True, False]", "whole numbers"]),
        ({"labels": 10}, ["labels 10 … 10", "0 … 9"]),
        ({"labels": "cat"}, ["labels", "'cat' is unknown", "none by name"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_does_not_exist_is_refused_by_name(model, call, named):
    with pytest.raises(UserError) as refused:
        model.sample(**({"seeds": [0, 1]} | call))
    message = str(refused.value)
    assert "\n" not in message
    for part in named:
        assert part in message


def named(model: Model) -> Model:
    """The same model of data whose classes have names."""
    model = copy.copy(model)
    model.class_names = tuple("zero one two three four five six seven eight nine".split())
    return model


def test_one_value_stands_for_all_and_names_for_numbers(model, noisy):
    x, _, _ = noisy
    expected = model(x, jnp.full(4, 0.4), jnp.full(4, 3))
    for labels in (3, "three", ["three"] * 4, np.int8(3)):
        np.testing.assert_array_equal(named(model)(x, 0.4, labels), expected)
    np.testing.assert_array_equal(model(x, 0.4), model(x, 0.4, [-1] * 4))
    in_a_program = jax.jit(lambda x, sigma: model(x, sigma, 3))(x, 0.4)
    np.testing.assert_allclose(in_a_program, expected, rtol=1e-4, atol=1e-5)
    assert named(model).check_labels([5, 6], "seven").tolist() == [7, 7]
    assert model.check_labels([5, 6], 7).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("sigma", "labels", "message"),
    [
        ([0.4, 0.0, 1, 1], 3, "sigma=.*above 0"),
        (-1, 3, "sigma=-1: .*above 0"),
        (float("nan"), 3, "sigma=nan: .*above 0"),
        ("low", 3, "sigma=low: .*above 0"),
        ([0.4, 0.4], 3, r"sigma has shape \[2\], expected \[4\] or one for all"),
        (0.4, [3, 3, 3], r"labels has shape \[3\], expected \[4\]"),
        (0.4, 10, "labels 10 … 10: the model knows 0 … 9"),
        (0.4, 0.5, "labels=0.5: expected whole numbers"),
        (0.4, "tree", "the class 'tree' is unknown; known: three"),
    ],
)
def test_what_cannot_be_denoised_is_refused(model, noisy, sigma, labels, message):
    with pytest.raises(UserError, match=message):
        named(model)(noisy[0], sigma, labels)
    with pytest.raises(UserError, match=r"x has shape \[8, 8, 1\], expected \['B', 8, 8, 1\]"):
        model(noisy[0][0], 0.4)


def test_a_model_says_what_it_is(model, unconditional):
    assert repr(model) == (
        "Model(DiT of 1 block of width 32, 30,916 parameters, pixels [8, 8, 1], 10 classes, float32)"
    )
    assert "unconditional" in repr(unconditional)


def test_progress_is_a_bar_on_standard_error(model, capsys):
    model.sample(SEEDS[:8], batch_size=4, progress=True, **QUICK)
    assert "2/2" in capsys.readouterr().err
    model.sample(SEEDS[:4], batch_size=4, **QUICK)
    assert capsys.readouterr().err == ""
