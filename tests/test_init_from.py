"""Starting from other weights: which of them, and what is made anew or interpolated, and what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_case import Case
from PIL import Image
from tiny import ROOT, TINY, refusal, restored, tiny_flags

import maskdit_jax
from maskdit_jax import UserError, main
from maskdit_jax.config_file import load
from maskdit_jax.data.encoding import Encoding, encode_images
from maskdit_jax.data.image_sets import open_image_set
from maskdit_jax.training.init_from import adapt

# The recipes of ImageNet, cut down to the digits.
SMALL_IN256 = {
    "data.source": "digits",
    "data.space": "pixels",
    "data.image_size": 8,
    "data.channels": 1,
    "data.num_classes": 10,
    "method.network.size": "custom",
    "method.network.patch_size": 2,
    "method.sigma_data": 0.75,
    "compute.precision": "float32",
    "report.preview_rows": 2,
}
SMALL_UVIT = {
    "method.network.size": "custom",
    "method.network.hidden_size": 32,
    "method.network.depth": 3,
    "method.network.num_heads": 2,
    "method.network.patch_size": 2,
    "report.preview_rows": 2,
    "training.num_steps": 2,
}


def trained(workdir, config, options):
    main.main([f"--workdir={workdir}", *tiny_flags(options, config)])
    return restored(workdir)[0]


def assert_the_same(new, old):
    """But for zeros, which an update of 1e-30 moves."""
    np.testing.assert_allclose(new, old, rtol=0, atol=1e-20)


@pytest.fixture
def pretrained(run):
    """A finished masked run: the tiny digits' network is that of the ImageNet recipe, so cut down."""
    return run


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["both", "params", "ema"])
def test_tuning_without_reconstruction_starts_from_a_masked_run(pretrained, tmp_path, chosen):
    """The weight of a loss decides no parameter; the sets of weights are those that were chosen."""
    old = restored(pretrained)[0]
    options = SMALL_IN256 | {
        "init_from": str(pretrained),
        "init_weights": chosen,
        "method.mae_coef": 0,
        "training.num_steps": 1,
        "optimizer.learning_rate": 1e-30,  # lost to rounding: what it started from is still there
        "ema.decay": 1.0,
    }
    new = trained(tmp_path / "tuned", "in256_tune", options)
    params, ema = {
        "both": (old.params, old.ema["ema"]),
        "params": (old.params, old.params),
        "ema": (old.ema["ema"], old.ema["ema"]),
    }[chosen]
    jax.tree.map(assert_the_same, new.params, params)
    jax.tree.map(assert_the_same, new.ema["ema"], ema)


@pytest.mark.slow
def test_another_network_is_refused_by_the_name_of_the_option(pretrained, tmp_path, capsys):
    options = SMALL_IN256 | {"init_from": str(pretrained), "method.network.depth": 3}
    flags = [f"--workdir={tmp_path / 'tuned'}", *tiny_flags(options, "in256_tune")]
    line = refusal(capsys, main.main, flags)
    assert f"the model differs from the one in {pretrained}: method.network.depth=3 here, 2 there" in line
    options = SMALL_UVIT | {"init_from": str(pretrained)}
    flags = [f"--workdir={tmp_path / 'tuned'}", *tiny_flags(options, "digits_maskdm_finetune")]
    assert "method.name=maskdm here, maskdit there" in refusal(capsys, main.main, flags)


def image_folder(folder, classes, side=16):
    for label in range(classes):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(3):
            pixels = np.random.default_rng([label, number]).integers(0, 256, (side, side, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{number}.png")
    return {"data.source": f"folder:{folder}", "data.channels": 3, "data.num_classes": classes}


@pytest.mark.slow
def test_fine_tuning_at_another_resolution_with_other_classes(tmp_path, capsys):
    """Masked pre-training of MaskDM; then whole images, twice as large, of three classes instead of two."""
    small = SMALL_UVIT | image_folder(tmp_path / "two", 2) | {"data.image_size": 8}
    old = trained(tmp_path / "pretrained", "digits_maskdm_pretrain", small).params
    large = SMALL_UVIT | image_folder(tmp_path / "three", 3) | {"data.image_size": 16}
    large |= {"init_from": str(tmp_path / "pretrained"), "optimizer.learning_rate": 1e-30}
    large |= {"optimizer.weight_decay": 0, "optimizer.warmup_kimg": 0}
    new = trained(tmp_path / "tuned", "digits_maskdm_finetune", large).params
    said = capsys.readouterr().out
    assert "init_from: data.image_size=16 here, 8 there" in said
    assert "init_from: positions.table is interpolated from 4×4 to 8×8" in said
    assert "init_from: label_embedding.table [3, 32] is made anew: the classes are others" in said
    assert "raw weights, from which the EMA starts too, from step 2" in said
    assert new["positions"]["table"].shape == (64, 32)
    assert old["positions"].pop("table").shape == (16, 32)
    assert new["label_embedding"].pop("table").shape == (3, 32)
    del old["label_embedding"]["table"], new["positions"]["table"]
    jax.tree.map(assert_the_same, new, old)
    model = maskdit_jax.load(tmp_path / "tuned")
    assert model.class_names == ("class0", "class1", "class2")
    assert model.sample([0], "class2", num_steps=1).shape == (1, 16, 16, 3)


@pytest.mark.slow
def test_published_weights_of_1000_classes_are_tuned_to_three_and_to_another_resolution(
    vae, tmp_path, capsys, monkeypatch
):
    """Golden weights of a MaskDiT-S/2, of each stack two blocks; latents of a folder of images."""
    beyond = re.compile(r"blocks\.([2-9]|\d\d)\.")
    tensors = {k: x for k, x in Case("maskdit_s2_32").tensors().items() if not beyond.search(k)}
    maskdit_jax.import_torch(tensors, tmp_path / "imported", num_classes=1000, num_heads=6)
    old = maskdit_jax.load(tmp_path / "imported").params
    images = image_folder(tmp_path / "three", 3, side=40)["data.source"]
    autoencoder = maskdit_jax.load_autoencoder(vae)
    data, run = tmp_path / "latents", tmp_path / "tuned"
    how = Encoding(128, batch_size=3)
    encode_images(open_image_set(images), autoencoder, data, how, source=images)
    monkeypatch.chdir(vae.parent)
    options = {
        "data.source": f"latents:{data}",
        "data.image_size": 16,
        "data.num_classes": 3,
        "method.network.size": "S/2",
        "method.network.depth": 2,
        "method.network.decoder_depth": 2,
        "compute.precision": "float32",
        "init_from": str(tmp_path / "imported"),
        "vae": vae.name,  # relative: found from elsewhere too
        "training.num_steps": 2,
        "training.batch_size": 8,
        "report.preview_rows": 1,
        "optimizer.learning_rate": 1e-30,
    }
    file = f"--config={ROOT / 'configs/in256_tune.py'}"
    flags = [f"--config.{name}={value}" for name, value in (TINY | options).items()]
    main.main([f"--workdir={run}", file, *flags])
    said = capsys.readouterr().out
    assert "init_from: data.image_size=16 here, 32 there" in said
    assert "init_from: label_embedding.table [3, 384] is made anew: the classes are others" in said
    assert "init_from: 35 of 36 arrays, " in said
    monkeypatch.chdir(tmp_path)
    model = maskdit_jax.load(run)
    kept = dict(model.params)
    assert kept.pop("label_embedding")["table"].shape == (3, 384)
    jax.tree.map(assert_the_same, kept, {name: old[name] for name in kept})
    assert model.class_names == ("class0", "class1", "class2")
    assert model.sample([0], "class2", num_steps=1).shape == (1, 128, 128, 3)
    vae.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no autoencoder in .*: give another place of it as vae"):
        maskdit_jax.load(run)
    (tmp_path / "moved").rename(vae)


def test_interpolated_positions_keep_a_linear_table_linear_and_classes_may_go():
    ramp = jnp.arange(8.0)[:, None] + 10 * jnp.arange(8.0)[None]  # [row, column]
    saved = {"positions": {"table": ramp.reshape(64, 1)}, "label_embedding": {"table": jnp.ones((2, 1))}}
    notes: list[str] = []
    adapted = adapt(saved, {"positions": {"table": jnp.zeros((256, 1))}}, notes)
    table = np.asarray(adapted["positions"]["table"]).reshape(16, 16)
    inner = table[4:-4, 4:-4]  # nearer to the border there is nothing to look at on the other side
    np.testing.assert_allclose(np.diff(inner, axis=0), 0.5, atol=1e-5)
    np.testing.assert_allclose(np.diff(inner, axis=1), 5, atol=1e-5)
    np.testing.assert_allclose(inner.mean(), ramp.mean(), atol=1e-5)
    assert "label_embedding is left out: this run is unconditional" in notes[-1]


def test_recipes_of_fine_tuning_start_from_raw_weights_and_hide_nothing():
    for name in ("celebahq256_finetune", "celeba64_finetune", "transfer_small", "digits_maskdm_finetune"):
        config = load(f"configs/{name}.py")
        assert (config.init_weights, config.method.mask_type) == ("params", "none"), name
