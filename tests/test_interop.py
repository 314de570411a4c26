"""PyTorch weights in and out: bit-exact round trips, strict and safe reading, the exported file in torch."""

import argparse
import json
import logging
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file
from tiny import NETWORK, NUM_STEPS, ROOT, call_tool, command_environment, refusal, tiny_flags

from maskdit_jax import UserError, export_torch, import_torch, load, main
from maskdit_jax.benchmark.torch_maskdit import Denoiser
from maskdit_jax.exchange import CARD, CONFIG
from maskdit_jax.interop.maskdit import to_torch
from maskdit_jax.interop.torch_io import as_float32, read_file, shapes_of
from maskdit_jax.methods.maskdit import MaskDiT, MaskDiTNetwork
from maskdit_jax.methods.method import Shape, init_params
from maskdit_jax.models.compute import Compute
from maskdit_jax.models.maskdit import SIZES
from maskdit_jax.training.checkpoint import open_run

pytestmark = pytest.mark.usefixtures("messages")
SMALL = {"size": "custom", "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 4}
SMALL |= {"decoder_hidden_size": 16, "decoder_depth": 1, "decoder_num_heads": 2}
HEADS = {"num_heads": 4, "decoder_num_heads": 2}
DATA = Shape(image_size=8, channels=1, num_classes=10)
PLAIN_DIT = {"use_decoder": False, "mask_token": False}
# Every patch size, and every set of tensors that a model can have; widths and depths are test_golden.py's.
VARIANTS = [("S/2", 100, {}), ("S/4", 0, {}), ("S/8", 100, {"mask_token": False})]
VARIANTS += [("S/2", 100, PLAIN_DIT), ("S/2", 0, PLAIN_DIT)]


def random_tensors(options: dict, data: Shape = DATA, seed: int = 0) -> dict[str, np.ndarray]:
    """Torch tensors of a MaskDiT, all random but for the position tables."""
    rng, network = np.random.default_rng(seed), MaskDiTNetwork(**options)
    shapes = jax.eval_shape(lambda: init_params(MaskDiT(network), data, Compute(), 0))
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), shapes)
    tensors = to_torch(params, network, data)
    return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return random_tensors(SMALL)


def assert_same_tensors(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == np.float32
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "num_classes", "variant"), VARIANTS, ids=str)
def test_export_import_export_is_byte_identical(size, num_classes, variant, tmp_path):
    """With the stacks cut short to two blocks, so that their order counts."""
    heads = SIZES[size.partition("/")[0]][2]
    options = {"size": size, "depth": 2, "decoder_depth": 2} | variant
    original = random_tensors(options, Shape(32, 4, num_classes))
    import_torch(original, tmp_path / "1", image_size=32, num_classes=num_classes, num_heads=heads)
    export_torch(load(tmp_path / "1"), tmp_path / "first/model.safetensors")
    import_torch(tmp_path / "first/model.safetensors", tmp_path / "2")
    export_torch(load(tmp_path / "2"), tmp_path / "second/model.safetensors")
    first, second = (tmp_path / f / "model.safetensors" for f in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    for beside in (CARD, CONFIG):
        assert (first.parent / beside).read_bytes() == (second.parent / beside).read_bytes()
    assert_same_tensors(load_file(first), original)


@pytest.mark.slow
def test_pt_file_keeps_raw_weights_and_ema_apart(tensors, tmp_path):
    ema = random_tensors(SMALL, seed=1)
    as_torch = {
        name: {k: torch.tensor(v) for k, v in w.items()} for name, w in (("model", tensors), ("ema", ema))
    }
    torch.save(as_torch | {"opt": {"lr": 0.1}, "args": argparse.Namespace(batch=2)}, tmp_path / "in.pt")
    import_torch(tmp_path / "in.pt", tmp_path / "imported", **HEADS)
    for folder in ("first", "second"):
        export_torch(load(tmp_path / "imported"), tmp_path / folder / "out.pt")
        import_torch(tmp_path / folder / "out.pt", tmp_path / f"imported from {folder}")
    assert (tmp_path / "first/out.pt").read_bytes() == (tmp_path / "second/out.pt").read_bytes()
    written = torch.load(tmp_path / "first/out.pt", weights_only=True)
    assert list(written) == ["model", "ema"]
    for name, expected in (("model", tensors), ("ema", ema)):
        assert_same_tensors({k: v.numpy() for k, v in written[name].items()}, expected)
    for weights, expected in (("params", tensors), ("ema", ema)):
        model = load(tmp_path / "imported from second", weights)
        export_torch(model, tmp_path / weights / "out.safetensors")
        assert_same_tensors(load_file(tmp_path / weights / "out.safetensors"), expected)


@pytest.mark.slow
def test_one_set_stands_for_raw_weights_and_ema(tensors, tmp_path):
    import_torch({k: torch.tensor(v) for k, v in tensors.items()}, tmp_path / "imported", **HEADS)
    for weights in ("ema", "params"):
        export_torch(load(tmp_path / "imported", weights), tmp_path / weights / "out.safetensors")
        assert_same_tensors(safetensors.numpy.load_file(tmp_path / weights / "out.safetensors"), tensors)


def tool(name: str, *flags: str, largest_file_kb: str = "unlimited") -> subprocess.CompletedProcess:
    limited = ["bash", "-c", f'ulimit -f {largest_file_kb} && exec "$@"', "bash"]
    script = [*limited, sys.executable, ROOT / "tools" / f"{name}.py", *flags]
    return subprocess.run(script, env=command_environment(), capture_output=True, text=True)


@pytest.mark.slow
def test_exported_run_in_plain_torch(run, tmp_path, monkeypatch, capsys):
    """The tool's .pt file loads strictly into torch layers, which denoise as our model does."""
    call_tool(monkeypatch, "export_pytorch", f"--workdir={run}", f"--out={tmp_path / 'out/digits.pt'}")
    said = capsys.readouterr().out
    assert re.fullmatch(rf"exported MaskDiT of 2 blocks .* of step {NUM_STEPS} to .*compared\n", said), said
    weights = torch.load(tmp_path / "out/digits.pt", weights_only=True)
    card, config = ((tmp_path / "out" / name).read_text() for name in (CARD, CONFIG))
    assert "sigma_data = 0.75" in card
    assert f"| Training step | {NUM_STEPS} |" in card
    assert json.loads(config)["config"]["method"]["sigma_data"] == 0.75

    rng = np.random.default_rng(0)
    x, sigma = rng.standard_normal((4, 8, 8, 1), np.float32), np.array([0.05, 0.4, 2, 30], np.float32)
    labels = np.array([3, -1, 0, 9])
    one_hot = torch.from_numpy((labels[:, None] == np.arange(10)).astype(np.float32))
    difference = {}
    for name, ours in (("ema", "ema"), ("model", "params")):
        denoiser = Denoiser(0.75, **DATA._asdict(), patch_size=2, **NETWORK)
        denoiser.load_state_dict(weights[name], strict=True)
        with torch.no_grad():
            theirs = denoiser(torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(sigma), one_hot)
        denoised = np.asarray(load(run, ours)(jnp.asarray(x), jnp.asarray(sigma), jnp.asarray(labels)))
        np.testing.assert_allclose(theirs.permute(0, 2, 3, 1), denoised, rtol=1e-4, atol=1e-4)
        difference[name] = denoised
    assert np.abs(difference["ema"] - difference["model"]).max() > 1e-3


@pytest.mark.slow
def test_imported_run_goes_on_like_a_run(run, tmp_path, monkeypatch, capsys):
    """Export by the tool, import by the tool: the same samples, and a run starts from it, saying how."""
    out = tmp_path / "out/digits.safetensors"
    call_tool(monkeypatch, "export_pytorch", f"--workdir={run}", f"--out={out}")
    flags = [f"--input={out}", f"--out={tmp_path / 'imported'}", "--num_classes=10"]
    call_tool(monkeypatch, "import_pytorch", *flags)
    assert "starts a fresh optimizer" in capsys.readouterr().out
    expected, model = load(run), load(tmp_path / "imported")
    np.testing.assert_array_equal(model.sample([1, 2, 3]), expected.sample([1, 2, 3]))

    start = {"training.num_steps": 1, "optimizer.learning_rate": 1e-9, "init_from": tmp_path / "imported"}
    main.main([f"--workdir={tmp_path / 'tuned'}", *tiny_flags(start)])
    for tuned, imported in zip(
        jax.tree.leaves(load(tmp_path / "tuned", "params").params), jax.tree.leaves(model.params), strict=True
    ):
        np.testing.assert_allclose(tuned, imported, rtol=0, atol=1e-8)

    before = files(tmp_path / "imported")
    with pytest.raises(SystemExit):  # an import is not a run that could be continued
        main.main([f"--workdir={tmp_path / 'imported'}", *tiny_flags()])
    assert files(tmp_path / "imported") == before


@pytest.mark.slow
def test_what_is_in_the_way_stays(run, tensors, tmp_path):
    for name in ("model.safetensors", CARD, CONFIG):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(UserError, match="exists already"):
            export_torch(load(run), folder / "model.safetensors")
        assert files(folder) == [name]
        assert (folder / name).read_text() == "mine"
        with pytest.raises(UserError, match="not an empty folder"):
            import_torch(tensors, folder, **HEADS)
    with pytest.raises(UserError, match=r"\.safetensors or \.pt"):
        export_torch(load(run), tmp_path / "x.onnx")


def test_config_of_another_file_is_not_used(run, tmp_path):
    export_torch(load(run), tmp_path / "out/model.safetensors")
    (tmp_path / "out/model.safetensors").rename(tmp_path / "out/other.safetensors")
    with pytest.raises(UserError, match=r"2 blocks of width 64.*tensors do not tell num_heads"):
        import_torch(tmp_path / "out/other.safetensors", tmp_path / "imported")


# What the tensors themselves can have wrong, and what the message must say.
def _wrong_shape(t):
    t["model.blocks.1.attn.qkv.weight"] = t["model.blocks.1.attn.qkv.weight"][:-1]


def _missing(t):
    for name in [n for n in t if n.startswith("model.blocks.0.")] + ["model.t_embedder.mlp.0.bias"]:
        del t[name]


def _three_at_once(t):
    _wrong_shape(t)
    del t["model.mask_token"], t["model.final_layer.linear.bias"]
    t["model.cls_token"] = np.zeros((1, 1, 32), np.float32)


CHANGES = {
    "missing": (_missing, ["11 missing: ", "model.blocks.0.attn.proj.bias", "…"]),
    "unexpected": (
        lambda t: t.update({"model.feat_embedder.weight": np.zeros((32, 16), np.float32)}),
        ["1 unexpected: model.feat_embedder.weight"],
    ),
    "number of a block": (
        lambda t: t.update({"model.blocks.9999999999.x": np.zeros(1, np.float32)}),
        ["1 unexpected: model.blocks.9999999999.x"],
    ),
    "shape": (
        _wrong_shape,
        ["1 of another shape: model.blocks.1.attn.qkv.weight [95, 32] instead of [96, 32]"],
    ),
    "several": (_three_at_once, ["1 missing", "1 unexpected: model.cls_token", "1 of another shape"]),
    "names of nobody": (
        lambda t: [t.update({f"nobody.{n}": t.pop(n)}) for n in list(t)],
        ["no MaskDiT", "no model.x_embedder.proj.weight", "it has nobody.model.pos_embed, "],
    ),
    "no patches": (lambda t: t.pop("model.x_embedder.proj.weight"), ["no model.x_embedder.proj.weight"]),
    "no blocks": (
        lambda t: [t.pop(n) for n in list(t) if n.startswith("model.blocks.")],
        ["no model.blocks.0"],
    ),
    "rank": (
        lambda t: t.update({"model.x_embedder.proj.weight": np.zeros((32, 4), np.float32)}),
        ["x_embedder.proj.weight", "expected 4 dimensions"],
    ),
    "class token": (
        lambda t: t.update({"model.pos_embed": np.zeros((1, 17, 32), np.float32)}),
        ["17 positions", "class tokens are not supported"],
    ),
    "learned positions": (
        lambda t: t.update({"model.pos_embed": t["model.pos_embed"] + np.float32(0.01)}),
        ["model.pos_embed is not the fixed sine-cosine table"],
    ),
    "integers": (
        lambda t: t.update({"model.mask_token": np.zeros((1, 1, 16), np.int64)}),
        ["1 tensor (model.mask_token (int64)) is neither float32"],
    ),
    "double": (lambda t: t.update({n: v.astype(np.float64) for n, v in t.items()}), ["float64", "…"]),
    "no tensor": (lambda t: t.update({"model.mask_token": "here"}), ["model.mask_token (str)"]),
    "sparse": (
        lambda t: t.update({"model.mask_token": torch.zeros(1, 1, 16).to_sparse()}),
        ["model.mask_token (torch.sparse_coo)"],
    ),
    "nested": (
        lambda t: t.update(
            {"model.mask_token": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(1)])}
        ),
        ["model.mask_token (nested)"],
    ),
    "without values": (
        lambda t: t.update({"model.mask_token": torch.zeros(1, 1, 16, device="meta")}),
        ["model.mask_token (meta)"],
    ),
    "complex": (
        lambda t: t.update({"model.mask_token": torch.zeros(1, 1, 16, dtype=torch.complex64).conj()}),
        ["model.mask_token (complex64)"],
    ),
    "what looks like a tensor": (
        lambda t: t.update({"model.mask_token": argparse.Namespace(dtype="float32", shape=(1, 1, 16))}),
        ["model.mask_token (Namespace)"],
    ),
    "names that are none": (
        lambda t: t.update({3: t["model.mask_token"], (1, "a"): t["model.mask_token"]}),
        ["2 keys (3, (1, 'a')) are no text"],
    ),
    "sides of a shape that no file could hold": (
        lambda t: t.update({"model.x_embedder.proj.weight": np.zeros((10**12, 0, 2, 2), np.float32)}),
        ["1 tensor (model.x_embedder.proj.weight) is empty"],
    ),
    "positions of another width": (
        lambda t: t.update({"model.pos_embed": np.zeros((1, 16, 4), np.float32)}),
        ["model.pos_embed has width 4, expected 32"],
    ),
    "nothing": (lambda t: t.clear(), ["holds no tensors"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_that_do_not_fit_are_named(change, tensors, tmp_path):
    spoil, expected = CHANGES[change]
    spoilt = dict(tensors)
    spoil(spoilt)
    with pytest.raises(UserError) as refused:
        import_torch(spoilt, tmp_path / "imported", **HEADS)
    assert "\n" not in str(refused.value)
    for part in expected:
        assert part in str(refused.value)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"model": "MaskDiT-S/2"}, "model=MaskDiT-S/2 expected, MaskDiT of 2 blocks of width 32 found"),
        ({"image_size": 32}, "image_size=32 expected, 8 found"),
        ({"num_classes": 1000}, "num_classes=1000 expected, 10 found"),
        ({"num_heads": 5}, "num_heads=5 does not divide the width 32"),
    ],
)
def test_what_is_expected_is_compared_with_the_tensors(expected, message, tensors, tmp_path):
    with pytest.raises(UserError, match=message):
        import_torch(tensors, tmp_path / "imported", **HEADS | expected)
    assert files(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_half_precision_is_taken_and_said(dtype, kind, tensors, tmp_path, caplog):
    file, number = tmp_path / f"half.{kind}", {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    if kind == "pt":
        torch.save({k: torch.from_numpy(v).to(getattr(torch, dtype)) for k, v in tensors.items()}, file)
    else:
        save_file({k: v.astype(number) for k, v in tensors.items()}, file)
    import_torch(file, tmp_path / "imported", **HEADS)
    assert f"is {dtype}: taken as float32" in caplog.text
    export_torch(load(tmp_path / "imported"), tmp_path / "out/model.safetensors")
    for name, value in load_file(tmp_path / "out/model.safetensors").items():
        rounded = tensors[name] if name.endswith("pos_embed") else tensors[name].astype(number)
        np.testing.assert_array_equal(value, rounded.astype(np.float32), err_msg=name)


def test_views_are_taken_as_what_they_show(tensors, tmp_path):
    """Turned round, with the sign still to be changed, with a gradient: in memory and in a file."""
    views = {name: torch.tensor(x) for name, x in tensors.items()}
    views["model.mask_token"] = torch._neg_view(-views["model.mask_token"])
    name = "model.blocks.0.mlp.fc1.weight"
    views[name] = views[name].T.contiguous().T.requires_grad_()
    torch.save(views, tmp_path / "views.pt")
    in_numpy = tensors | {name: np.ascontiguousarray(tensors[name][::-1])[::-1]}
    for source in (views, read_file(tmp_path / "views.pt"), in_numpy):
        assert shapes_of(source, "here") == {name: x.shape for name, x in tensors.items()}
        assert_same_tensors(as_float32(source, "here"), tensors)


def test_nan_weights_are_taken_with_a_warning_that_names_them(tensors, tmp_path, caplog):
    spoilt = tensors | {"model.mask_token": np.full((1, 1, 16), np.nan, np.float32)}
    save_file(spoilt, tmp_path / "nan.safetensors")
    import_torch(tmp_path / "nan.safetensors", tmp_path / "imported", **HEADS)
    (warning,) = (r.message for r in caplog.records if r.levelno == logging.WARNING)
    assert "1 tensor (model.mask_token) is not finite" in warning
    export_torch(load(tmp_path / "imported"), tmp_path / "out/model.safetensors")
    np.testing.assert_array_equal(load_file(tmp_path / "out/model.safetensors")["model.mask_token"], np.nan)


def test_tool_refuses_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    flags = [f"--input={tmp_path / 'bad.safetensors'}", f"--out={tmp_path / 'imported'}"]
    error = refusal(capsys, call_tool, monkeypatch, "import_pytorch", *flags)
    assert re.fullmatch(r"error: .*bad\.safetensors is damaged.*\n", error)
    assert files(tmp_path) == ["bad.safetensors"]


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_full_disk_leaves_nothing_behind(kind, run, tmp_path):
    """No file may grow past 50 kB here, which the libraries see as they see a full disk."""
    done = tool(
        "export_pytorch",
        f"--workdir={run}",
        f"--out={tmp_path / 'out' / f'model.{kind}'}",
        largest_file_kb="50",
    )
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: .*model\.\w+ could not be written: .*\n", done.stderr), done.stderr
    assert files(tmp_path) == ["out"]


def test_import_says_where_it_is_from(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    import_torch(tmp_path / "model.safetensors", tmp_path / "imported", **HEADS)
    checkpoints = open_run(tmp_path / "imported")
    assert checkpoints.meta(checkpoints.steps[-1])["imported_from"] == str(tmp_path / "model.safetensors")
    checkpoints.close()
