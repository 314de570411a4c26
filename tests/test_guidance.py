"""Guidance: its two sides, where it acts, and how many networks are evaluated for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maskdit_jax.diffusion.guidance import NULL_LABEL, guide, is_guided, network_sides, null_label_sides
from maskdit_jax.diffusion.solvers import SOLVERS, SamplerOptions, count_network_calls, generate

SHAPE = (4, 4, 1)
SEEDS = jnp.arange(2, dtype=jnp.uint32)
LABELS = jnp.array([0, 2])


def network(std: float, evaluated: list[int] | None = None):
    """The exact denoiser of data N(label, std²); counts the images that it is given, where it is run."""

    def denoise(x, sigma, labels):
        if evaluated is not None:
            jax.debug.callback(lambda labels: evaluated.append(len(labels)), labels)
        s, mean = sigma[:, None, None, None], labels[:, None, None, None].astype(x.dtype)
        return (x * std**2 + mean * s**2) / (std**2 + s**2)

    return denoise


NETWORK, WEAK = network(0.5), network(0.7)


def sample(options, denoise=NETWORK, weak=None, **others):
    options = SamplerOptions(**{"num_steps": 12, "solver": "euler"} | options)
    program = jax.jit(lambda seeds: generate(denoise, seeds, LABELS, SHAPE, options, weak=weak, **others))
    return np.asarray(program(SEEDS))


def test_guided_is_the_weak_side_and_scale_times_what_it_lacks():
    x, sigma = jax.random.normal(jax.random.key(0), (2, *SHAPE)), jnp.array([0.3, 2.0])
    strong, weak = NETWORK(x, sigma, LABELS), WEAK(x, sigma, LABELS)
    nothing = NETWORK(x, sigma, jnp.full(2, NULL_LABEL))
    for sides, other in ((network_sides(NETWORK, WEAK), weak), (null_label_sides(NETWORK), nothing)):
        for scale in (0.0, 1.0, 2.5):
            guided = guide(sides, scale)(x, sigma, LABELS)
            np.testing.assert_allclose(guided, other + scale * (strong - other), rtol=1e-5, atol=1e-6)


def test_guidance_from_the_network_itself_is_none():
    plain = sample({"cfg_scale": 1.0})
    np.testing.assert_allclose(sample({"cfg_scale": 3.0}, weak=NETWORK), plain, rtol=0, atol=1e-6)
    assert np.abs(sample({"cfg_scale": 3.0}, weak=WEAK) - plain).max() > 0.1


@pytest.mark.parametrize("weak", [None, WEAK], ids=["null_label", "network"])
def test_steps_of_an_interval_are_those_of_a_decision_in_every_call(weak):
    """As one loop would do it, that computes both and chooses."""
    low, high = 0.3, 3.0
    both = guide(network_sides(NETWORK, weak) if weak else null_label_sides(NETWORK), 2.0)

    def decides(x, sigma, labels):
        inside = ((low < sigma) & (sigma <= high))[:, None, None, None]
        return jnp.where(inside, both(x, sigma, labels), NETWORK(x, sigma, labels))

    options = {"cfg_scale": 2.0, "guidance_interval": (low, high), "solver": "heun", "S_churn": 3.0}
    expected = sample(options | {"cfg_scale": 1.0, "guidance_interval": None}, denoise=decides)
    np.testing.assert_allclose(sample(options, weak=weak), expected, rtol=0, atol=1e-5)


def test_interval_holds_its_upper_end_only_and_none_is_everywhere():
    sigma = np.array([80 * (1 + 1e-12), 80.0, 3.0, 0.3])
    assert is_guided(sigma, 1.5, (0.3, 80)).tolist() == [True, True, True, False]
    assert is_guided(sigma, 1.5, None).all()
    assert not is_guided(sigma, 1.0, None).any()


INTERVAL = {"num_steps": 40, "guidance_interval": (0.3, 3.0)}


@pytest.mark.parametrize(
    ("options", "autoguided", "expected"),
    [
        (INTERVAL | {"solver": "heun"}, False, 97),
        (INTERVAL | {"solver": "heun"}, True, 97),
        ({"solver": "heun", "num_steps": 1}, False, 2),
        ({"solver": "heun", "num_steps": 5, "cfg_scale": 1.0}, False, 9),
        ({"solver": "heun", "num_steps": 5, "guidance_interval": (100.0, 200.0)}, True, 9),
        ({"solver": "heun", "num_steps": 5, "alpha": 0.5, "S_churn": 2.0}, False, 18),
        *(({"solver": solver, "num_steps": 7}, False, 14) for solver in SOLVERS if solver != "heun"),
        ({"solver": "dpmpp_2m", "num_steps": 7, "guidance_interval": (0.3, 3.0)}, True, 9),
    ],
    ids=str,
)
def test_network_calls_are_as_many_as_counted(options, autoguided, expected):
    """In the compiled program: each call tells how many images it was given."""
    evaluated: list[int] = []
    weak = network(0.7, evaluated) if autoguided else None
    sample(options | {"eta": 1.0}, denoise=network(0.5, evaluated), weak=weak)
    jax.effects_barrier()
    assert sum(evaluated) == expected * len(SEEDS)
    assert count_network_calls(SamplerOptions(**options)) == expected
    plain = count_network_calls(SamplerOptions(**options), guided=False)
    assert plain == (2 * options["num_steps"] - 1 if options["solver"] == "heun" else options["num_steps"])
