"""The configuration that was saved with weights: foreign when it is read, and perhaps of an older layout."""

from typing import Any

from maskdit_jax.config import SECTIONS, ConfigDict, Run, check_method, defaults, leaves, sampling_section
from maskdit_jax.diffusion.solvers import SamplerOptions
from maskdit_jax.errors import UserError, first_line, shown
from maskdit_jax.methods import METHODS
from maskdit_jax.methods.method import Shape
from maskdit_jax.models.compute import Compute
from maskdit_jax.options import IN_WORDS, as_section, check_option, each_option, is_a

# What weights need of the configuration saved with them, beside the method: all that an import has.
_DATA = tuple(f"data.{name}" for name in (*Shape._fields, "space", "latent_scale"))
_CLOSED = ("method", "compute", "sampling")  # these sections are arguments: nothing else may stand there
# The sampler's options that came later: where they are missing, their defaults do as was done before.
LATER = ("schedule", "scaling", "alpha", "guided_channels", "cfg_growth")
COMPUTE_LATER = ("attention",)  # likewise

# All that an import had before there were methods, and every run.
_BEFORE_METHODS = """
    model.size model.hidden_size model.depth model.num_heads model.patch_size model.image_size
    model.channels model.num_classes model.use_decoder model.decoder_hidden_size model.decoder_depth
    model.decoder_num_heads model.precision model.remat model.unroll
    diffusion.sigma_data diffusion.mae_coef data.space data.latent_scale
    sampling.num_steps sampling.solver sampling.cfg_scale sampling.sigma_min sampling.sigma_max sampling.rho
    sampling.S_churn sampling.S_min sampling.S_max sampling.S_noise
""".split()


def saved_config(content: Any) -> ConfigDict:
    """The configuration that was saved with weights, found to have what their use needs.

    Raises:
      UserError: something is missing, of another type, or no value that `resolve` takes.
    """
    try:
        content = _upgraded(content)
        found = leaves(content)
        _check_types(found)
        _check_values(found)
        config = ConfigDict(content)
        check_method(config)
    except UserError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the configuration cannot be used: {first_line(error, 100)}") from error
    return config


def _check_types(found: dict[str, Any]) -> None:
    """Compare options, by their full names, with what is used of a saved configuration."""
    name = found.get("method.name")
    if "method.name" not in found:
        raise UserError("the configuration lacks method.name")
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(f"method.name={shown(name)} is unknown; known: {', '.join(METHODS)}")
    kinds: dict[str, type] = {"method.name": str}
    for section, record in (
        ("method", METHODS[name]),
        ("data", SECTIONS["data"]),
        ("compute", SECTIONS["compute"]),
        ("sampling", SamplerOptions),
    ):
        kinds |= {option: kind for option, _, kind in each_option(record, f"{section}.")}
    for option in [o for o in kinds if o.partition(".")[0] == "data" and o not in _DATA]:
        del kinds[option]
    del kinds["sampling.guidance_interval"]
    missing = [name for name in kinds if name not in found]
    if missing:
        raise UserError(f"the configuration lacks {', '.join(missing[:3])}")
    for name, value in found.items():
        if name.partition(".")[0] in _CLOSED and name not in kinds:
            raise UserError(f"the option {shown(name)} is unknown")
        kind = kinds.get(name) or type(value)
        if kind not in IN_WORDS or not is_a(value, kind):
            expected = IN_WORDS.get(kind, "a number or a text")
            raise UserError(f"{shown(name)}={shown(value)}: expected {expected}")
        # A longer one cannot even be compared with a float.
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"{shown(name)} is no 64-bit number")


def _check_values(found: dict[str, Any]) -> None:
    """What else there is, of a run, is used too: the grid's rows, the autoencoder …"""
    for prefix, record in {"": Run, **{f"{name}.": record for name, record in SECTIONS.items()}}.items():
        for name, field, kind in each_option(record, prefix):
            if name in found:
                check_option(name, found[name], field, kind)


def _upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """A configuration of today's layout; before there were methods, all was MaskDiT, in other sections."""
    if "method" in content or "model" not in content:
        for section, record, names in (
            ("sampling", SamplerOptions(), LATER),
            ("compute", Compute(), COMPUTE_LATER),
        ):
            if isinstance(content.get(section), dict):
                later = {name: getattr(record, name) for name in names}
                content = content | {section: later | content[section]}
        return content
    missing = [name for name in _BEFORE_METHODS if name not in leaves(content)]
    if missing:
        raise UserError(f"the configuration lacks {', '.join(missing[:3])}")
    content = {name: dict(x) if isinstance(x, dict) else x for name, x in content.items()}
    model, diffusion = content.pop("model"), content.pop("diffusion")
    compute = {name: model.pop(name) for name in ("precision", "remat", "unroll")}
    shape = {name: model.pop(name) for name in Shape._fields}
    # The weight of the loss decided it.
    network = model | {"mask_token": diffusion["mae_coef"] > 0}
    content["method"] = defaults("maskdit").method.to_dict() | diffusion | {"network": network}
    content["data"] |= shape
    content["compute"] = as_section(Compute()) | compute
    content["sampling"] = sampling_section(METHODS["maskdit"].sampler) | content["sampling"]
    training = content.get("training", {})
    if "ema_decay" in training:
        content["ema"] = as_section(SECTIONS["ema"](decay=training.pop("ema_decay")))
    return content
