"""Hostile weights and run folders: the cases of tests/test_hostile.py for readers of weights."""

import functools
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from damage import Damage, changed, content, cut, deep, folder, huge, json_with, pipe, removed
from readers import META, repair_meta, tiny_tensors
from safetensors.numpy import load_file, save_file

LARGE = 10**20  # more than any counter or memory holds


# .pt files


def saved(make: Callable[[dict[str, torch.Tensor]], object], **options: Any) -> Damage:
    """What torch.save writes of `make(tensors)`."""

    def damage(path: Path) -> None:
        torch.save(make({name: torch.tensor(x) for name, x in tiny_tensors().items()}), path, **options)

    return damage


def with_token(make: Callable[[torch.Tensor], object]) -> Damage:
    """The mask token is another."""
    return saved(lambda t: t | {"model.mask_token": make(t["model.mask_token"])})


def pickled(new: bytes, method: int = zipfile.ZIP_STORED) -> Damage:
    """The archive's pickle is `new`; the directory is as PyTorch writes it but for the method."""

    def damage(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("in/data.pkl", new)
            archive.writestr("in/version", b"3")

    return damage


def bomb(path: Path) -> None:
    """A pickle of 4 GB of zeros in 4 MB; the size is in the directory alone, so that the test is quick."""
    pickled(bytes(4_000_000), zipfile.ZIP_DEFLATED)(path)
    new = bytearray(path.read_bytes())
    at = new.find(b"PK\1\2") + 24
    new[at : at + 4] = struct.pack("<L", 4_000_000_000)
    path.write_bytes(new)


def names_twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("in/DATA.pkl", pickle.dumps({}, 2))
        archive.writestr("in/data.pkl", pickle.dumps({}, 2))


class RunsCode:
    def __reduce__(self) -> tuple:
        return os.system, ("touch pwned",)


HALF_DONE = b"\x80\x02"
NESTED_KEY = HALF_DONE + b"})q\0" + b"h\0h\0\x86q\0" * 40 + b"K\1s."  # to hash it takes 2⁴⁰ steps
ONE_HASH = HALF_DONE + b"}" + b"\x8a\x0b" + (2**61 - 1 << 20).to_bytes(11, "little") + b"K\1s."
ENDLESS_LIST = HALF_DONE + b"]q\0(" + b"h\0" * 1_000_000 + b"e."
DEEP_LIST = HALF_DONE + b"]" * 400_000 + b"a" * 399_999 + b"."
BUFFER = HALF_DONE + b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
DOUBLING = HALF_DONE + b"c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0hex\x86R."
SHADOWED = HALF_DONE + b"ccollections\nOrderedDict\n)R}X\5\0\0\0itemsK\1sb."
OTHER_ATTRIBUTES = HALF_DONE + b"ccollections\nOrderedDict\n)R]b."
STRANGE_NAME = HALF_DONE + "cos\nsys\tt\u202eem\n.".encode()
LONG_NAME = HALF_DONE + b"cos\n" + b"x" * 100_000 + b"\n."
TERABYTE = lambda t: {"a": torch.zeros(1).expand(10**6, 10**6)}  # noqa: E731

PT = [
    ("code", saved(lambda t: {"model": RunsCode()}), "it would call posix.system", "Nothing was run"),
    ("code, old", saved(lambda t: RunsCode(), _use_new_zipfile_serialization=False), "posix.system"),
    ("cut short", cut("", -100), "damaged or not a PyTorch file"),
    ("text", content("", b"hello world"), "damaged or not a PyTorch file"),
    ("empty", content("", b""), "damaged or not a PyTorch file"),
    ("missing", removed(""), "no such file"),
    ("a folder", folder(""), "not a file"),
    ("a pipe", pipe(""), "not a file"),
    ("a terabyte by a hole", huge("", 10**12), "damaged or not a PyTorch file"),
    ("a list", saved(lambda t: [1, 2]), "holds a list, expected tensors by name"),
    ("nothing", saved(lambda t: {}), "holds no tensors"),
    ("a terabyte by strides", saved(TERABYTE), "claims 4,000,000,000,000 bytes"),
    ("keys that are numbers", saved(lambda t: {1: t["model.mask_token"]} | t), "1 key (1) is no text"),
    ("keys that are tuples", saved(lambda t: {(1, "a"): t} | t), "a key in it is a tuple"),
    ("mixed keys beside weights", saved(lambda t: {"ema": {}, 3: 1, None: 2, "a": 3}), "no MaskDiT"),
    ("nested", saved(lambda t: {"model": {"a": t}}), "1 tensor (a (dict)) is neither float32"),
    ("an object for a tensor", with_token(lambda x: "here"), "model.mask_token (str)"),
    ("complex", with_token(lambda x: torch.conj(x + 1j)), "model.mask_token (complex64)"),
    ("integers", with_token(lambda x: x.long()), "model.mask_token (int64)"),
    ("sparse", with_token(lambda x: x.to_sparse()), "would call torch._utils._rebuild_sparse_tensor"),
    ("quantized", with_token(lambda x: torch.quantize_per_tensor(x, 1, 0, torch.qint8)), "refused"),
    ("meta", with_token(lambda x: x.to("meta")), "refused, it is more than plain tensors"),
    ("of no size", with_token(lambda x: x[..., :0]), "1 tensor (model.mask_token) is empty"),
    ("a zip of 4 GB in 4 kB", bomb, "in/data.pkl in it is compressed"),
    ("names that differ by case", names_twice, "can be read in several ways"),
    ("directory elsewhere", changed("", lambda old: old + bytes(1000)), "no archive's directory at its end"),
    ("a key of nested tuples", pickled(NESTED_KEY), "a key in it is a tuple"),
    ("keys of one hash", pickled(ONE_HASH), "a number of 81 bits"),
    ("an endless list", pickled(ENDLESS_LIST), "takes more than 500,000 operations"),
    ("a deep list", pickled(DEEP_LIST), "takes more than 500,000 operations"),
    ("a buffer of 2 GB", pickled(BUFFER), "would call builtins.bytearray"),
    ("a text that doubles", pickled(DOUBLING), "would call _codecs.encode"),
    ("methods replaced", pickled(SHADOWED), "holds no tensors"),
    ("attributes that are no dict", pickled(OTHER_ATTRIBUTES), "attributes that are no dict"),
    ("a name with control characters", pickled(STRANGE_NAME), "damaged"),
    ("a long name", pickled(LONG_NAME), "would call os.xxx"),
]


# .safetensors files


def header(text: str | bytes, length: int | None = None) -> Damage:
    raw = text if isinstance(text, bytes) else text.encode()
    return content("", struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(8))


def entry(dtype: Any = "F32", shape: Any = (2,), data_offsets: Any = (0, 8)) -> Damage:
    """A header of one tensor."""
    return header(json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": data_offsets}}))


ENTRY = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
TWO = json.dumps({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"})
DIGITS = "9" * 5000
SAFETENSORS = [
    ("cut short", cut("", -100), "damaged or cut short"),
    ("empty", content("", b""), "damaged or cut short"),
    ("a folder", folder(""), "not a file"),
    ("a pipe", pipe(""), "not a file"),
    ("no header", header("", 0), "its header cannot be read"),
    ("terabyte header", header("{}", 10**12), "with a header of 1,000,000,000,000"),
    ("header of 2⁶³", header("{}", 2**63), "with a header of 9,223,372,036,854,775,808"),
    ("large header", header("[" + "[]," * 2_000_000 + "0]"), "with a header of"),
    ("header not UTF-8", header(b'{"\xff\xfe": 1}'), "its header cannot be read"),
    ("no JSON", header("hello"), "its header cannot be read"),
    ("a list", header("[1]"), "it is no JSON object"),
    ("deep", header('{"a":' * 100_000), "its header cannot be read"),
    ("a name twice", header(f"{{{ENTRY},{ENTRY}}}"), "1 name (a) is there twice"),
    ("a key twice", header('{"a":{"dtype":"F32","dtype":"F16"}}'), "1 name (dtype) is there twice"),
    ("number of 5,000 digits", header(ENTRY.replace("2]", f"{DIGITS}]").join("{}")), "cannot be read"),
    ("metadata is a number", header(f'{{"__metadata__":1,{ENTRY}}}'), "damaged or cut short"),
    ("entry is a list", header('{"a":[]}'), "says of a dtype None"),
    ("dtype a list", entry(dtype=["F32"]), "dtype ['F32']"),
    ("dtype a dict", entry(dtype={"F32": 1}), "dtype {'F32': 1}"),
    ("dtype unknown", entry(dtype="F8_E4M3"), "F8_E4M3"),
    ("shape negative", entry(shape=[-2]), "shape [-2]"),
    ("shape of fractions", entry(shape=[2.0]), "shape [2.0]"),
    ("shape true", entry(shape=[True, 2]), "shape [True, 2]"),
    ("shape deep", header('{"a":{"dtype":"F32","shape":%s}}' % ("[" * 900 + "]" * 900)), "damaged"),
    ("shape larger than the file", entry(shape=[2**40], data_offsets=[0, 2**42]), "damaged or cut short"),
    ("shape beyond 64 bits", entry(shape=[2**63, 2]), "damaged or cut short"),
    ("shape beyond any bits", entry(shape=[LARGE]), "damaged or cut short"),
    ("offsets outside", entry(data_offsets=[8, 16]), "damaged or cut short"),
    ("offsets backwards", entry(data_offsets=[8, 0]), "damaged or cut short"),
    ("offsets overlapping", header(TWO), "damaged or cut short"),
    ("offsets missing", entry(data_offsets=None), "data_offsets None"),
]


# The config.json beside an export

NETWORK = "method.network"


def option(section: str, **new: Any) -> Damage:
    """Options of one section of the configuration, such as "method.network", are others."""

    def change(old: bytes) -> bytes:
        about = json.loads(old)
        functools.reduce(dict.__getitem__, section.split("."), about["config"]).update(new)
        return json.dumps(about).encode()

    return changed("", change)


EXPORT = [
    ("no JSON", content("", b"hello"), "config.json cannot be read"),
    ("a list", content("", b"[]"), "expected a JSON object"),
    ("deep", deep(""), "config.json is damaged"),
    ("deep inside", json_with("", config=json.loads('{"a":' * 300 + "1" + "}" * 300)), "lacks method.name"),
    ("no configuration", json_with("", config=...), "config.json is damaged"),
    ("configuration a text", json_with("", config="x"), "config.json is damaged"),
    ("section a text", json_with("", config={"method": "x"}), "lacks method.name"),
    ("step infinite", json_with("", step=float("inf")), "step=inf, expected a whole number"),
    ("step NaN", json_with("", step=float("nan")), "step=nan"),
    ("step a fraction", json_with("", step=1.5), "step=1.5"),
    ("step true", json_with("", step=True), "step=True"),
    ("step negative", json_with("", step=-1), "step=-1"),
    ("step large", json_with("", step=LARGE), "step=1000"),
    ("step of 5,000 digits", changed("", lambda old: old.replace(b'"step": 0', f'"step": {DIGITS}'.encode())),
     "config.json"),
    ("heads a text", option(NETWORK, num_heads="2"), "method.network.num_heads=2: expected a whole number"),
    ("heads true", option(NETWORK, num_heads=True), "method.network.num_heads=True"),
    ("heads that do not divide", option(NETWORK, num_heads=3), "method.network.num_heads=3 does not divide"),
    ("heads none", option(NETWORK, num_heads=0), "method.network.num_heads=0 must be at least 1"),
    ("patches none", option(NETWORK, patch_size=0), "method.network.patch_size=0 must be at least 1"),
    ("sigma_data a text", option("method", sigma_data="0.5"), "method.sigma_data=0.5: expected"),
    ("sigma_data zero", option("method", sigma_data=0), "method.sigma_data=0 must be greater"),
    ("sigma_data NaN", option("method", sigma_data=float("nan")), "sigma_data=nan must be finite"),
    ("mae_coef null", option("method", mae_coef=None), "method.mae_coef=None"),
    ("method unknown", option("method", name="x"), "method.name=x is unknown"),
    ("method a list", option("method", name=["x"]), "method.name=['x'] is unknown"),
    ("network a text", option("method", network="x"), "config.json is damaged"),
    ("network's option unknown", option(NETWORK, dropout=0.1), "method.network.dropout is unknown"),
    ("space unknown", option("data", space="pixel"), "data.space='pixel' is unknown"),
    ("latent_scale a list", option("data", latent_scale=[1]), "data.latent_scale=[1]"),
    ("latent_scale huge", option("data", latent_scale=10**400), "no 64-bit number"),
    ("solver a number", option("sampling", solver=1), "sampling.solver=1: expected a text"),
    ("solver unknown", option("sampling", solver="x"), "solver"),
    ("sampling steps a text", option("sampling", num_steps="40"), "sampling.num_steps=40"),
    ("sampling steps a fraction", option("sampling", num_steps=40.5), "sampling.num_steps=40.5"),
    ("sampling steps none", option("sampling", num_steps=0), "num_steps=0"),
    ("sigmas turned round", option("sampling", sigma_min=90), "sigma_min=90"),
    ("S_churn true", option("sampling", S_churn=True), "sampling.S_churn=True"),
    ("cfg_scale negative", option("sampling", cfg_scale=-1), "cfg_scale=-1"),
    ("another option", option("sampling", steps=1), "sampling.steps is unknown"),
]  # fmt: skip


# Run folders: what is wrong with the only checkpoint is in a warning, so what the line says is always this

UNREADABLE = "step 3, cannot be read"


def meta(**new: Any) -> Damage:
    """Other values, under a digest that is right."""

    def damage(path: Path) -> None:
        json_with("", **new)(path)
        repair_meta(path)

    return damage


def in_config(section: str, **new: Any) -> Damage:
    """The same within the configuration; without options the section is a text."""

    def damage(path: Path) -> None:
        config = json.loads(path.read_text())["config"]
        meta(config=config | {section: config[section] | new if new else "x"})(path)

    return damage


def in_network(**new: Any) -> Damage:
    """The same of the network."""

    def damage(path: Path) -> None:
        network = json.loads(path.read_text())["config"]["method"]["network"]
        in_config("method", network=network | new)(path)

    return damage


def in_the_way(name: str) -> Damage:
    """A file stands where the folder belongs."""

    def damage(path: Path) -> None:
        shutil.rmtree(path / name, ignore_errors=True)
        (path / name).write_text("mine")

    return damage


METAS = [
    ("config missing", meta(config=...)),
    ("config a list", meta(config=[])),
    ("config's section a text", in_config("method")),
    ("width a text", in_network(hidden_size="8")),
    ("width huge", in_network(hidden_size=LARGE)),
    ("option unknown", in_network(dropout=0.1)),
    ("sampling steps null", in_config("sampling", num_steps=None)),
    ("preview rows a text", in_config("report", preview_rows="1")),
    ("class names a text", meta(class_names="cat")),
    ("class names too few", meta(class_names=["cat"])),
    ("class names of numbers", meta(class_names=list(range(10)))),
    ("items a text", meta(items_consumed="7")),
    ("items negative", meta(items_consumed=-7)),
    ("seconds NaN", meta(seconds=float("nan"))),
    ("seconds a text", meta(seconds="1.5")),
    ("no digests of weights", meta(digests={})),
    ("best a text", meta(best="x")),
    ("best by NaN", meta(best={"metric": "fid_2", "reference": "", "score": float("nan")})),
]
RUN = [
    ("no JSON", content(META, b"hello"), UNREADABLE),
    ("deep", deep(META), UNREADABLE),
    ("a pipe", pipe(META), UNREADABLE),
    ("large", huge(META, 2**30), UNREADABLE),
    ("Orbax's metadata a list", content("checkpoints/3/ema_params/_METADATA", b"[]"), UNREADABLE),
    ("Orbax's metadata deep", deep("checkpoints/3/ema_params/_METADATA"), UNREADABLE),
    ("an index that is a pipe", pipe("checkpoints/3/ema_params/manifest.ocdbt"), UNREADABLE),
    ("an index cut short", cut("checkpoints/3/ema_params/manifest.ocdbt", 20), UNREADABLE),
    ("checkpoints a file", in_the_way("checkpoints"), "is not the folder of a run"),
]


# The autoencoder

VAE, VAE_WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
AUTOENCODER = [
    ("no weights", removed(VAE_WEIGHTS), "no autoencoder in", "stabilityai/sd-vae-ft-ema", "hf download"),
    ("weights damaged", content(VAE_WEIGHTS, b"x"), "damaged or cut short"),
    ("config missing", removed(VAE), "no autoencoder in"),
    ("config no JSON", content(VAE, b"{"), "config.json cannot be read"),
    ("config deep", deep(VAE), "config.json is damaged"),
    ("config a list", content(VAE, b"[[1, 2]]"), "expected a JSON object"),
    ("groups that do not divide", json_with(VAE, norm_num_groups=3), "norm_num_groups=3 must divide"),
    ("groups true", json_with(VAE, norm_num_groups=True), "norm_num_groups=True must divide"),
    ("groups a text", json_with(VAE, norm_num_groups="2"), "norm_num_groups=2 must divide"),
    ("groups none", json_with(VAE, norm_num_groups=0), "norm_num_groups=0 must divide"),
    ("scale a text", json_with(VAE, scaling_factor="0.18215"), "scaling_factor=0.18215, expected a number"),
    ("scale zero", json_with(VAE, scaling_factor=0), "scaling_factor=0, expected a number"),
    ("scale NaN", json_with(VAE, scaling_factor=float("nan")), "scaling_factor=nan, expected a number"),
    ("scale null", json_with(VAE, scaling_factor=None), "scaling_factor=None, expected a number"),
    ("scale of 400 digits", json_with(VAE, scaling_factor=10**400), "scaling_factor=a huge number"),
    (
        "widths of another",
        json_with(VAE, block_out_channels=[4, 16]),
        "block_out_channels=[4, 16], its tensors",
    ),
    ("widths a text", json_with(VAE, block_out_channels="4, 8"), "block_out_channels=4, 8, its tensors"),
    ("layers a text", json_with(VAE, layers_per_block="1"), "layers_per_block=1, its tensors 1"),
    ("shifted", json_with(VAE, shift_factor=0.1), "shift_factor=0.1 is not supported"),
    ("another activation", json_with(VAE, act_fn="x" * 10_000), "act_fn=xxx"),
]


# Inception


def tensor(name: str, value: Any) -> Damage:
    """A tensor is another; None: it is missing."""

    def damage(path: Path) -> None:
        tensors = load_file(path) | {name: value}
        save_file({name: x for name, x in tensors.items() if x is not None}, path)

    return damage


ONES = np.ones(2, np.float32)
INCEPTION = [
    ("missing", removed(""), "no such file", "sha256 6726825d", "toshas/torch-fidelity"),
    ("a folder", folder(""), "not a file"),
    ("a pipe", pipe(""), "not a file"),
    ("cut short", cut("", -10), "damaged or cut short"),
    ("a name missing", tensor("first.bn.bias", None), "1 missing: first.bn.bias"),
    ("a name unexpected", tensor("second.bn.running_var", ONES), "1 unexpected: second.bn.running_var"),
    ("a counter unexpected", tensor("second.bn.num_batches_tracked", ONES), "1 unexpected: second.bn.num"),
    ("other classes", tensor("fc.bias", ONES), "1 of another shape: fc.bias [2] instead of [4]"),
    ("integers", tensor("fc.bias", np.arange(4)), "1 tensor (fc.bias (int64)) is neither"),
    ("NaN", tensor("first.bn.weight", ONES * np.nan), "first.bn.weight has values that are not finite"),
    ("negative variance", tensor("first.bn.running_var", -ONES), "first.bn.running_var has values that are"),
]

CASES = [
    *(("pt", *case) for case in PT),
    *(("safetensors", *case) for case in SAFETENSORS),
    *(("export", *case) for case in EXPORT),
    *(("meta", *case, UNREADABLE) for case in METAS),
    *(("run", *case) for case in RUN),
    *(("autoencoder", *case) for case in AUTOENCODER),
    *(("inception", *case) for case in INCEPTION),
]
