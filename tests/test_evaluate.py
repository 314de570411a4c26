"""Sets of samples measured against a reference: the card, what it warns of, its picture; certification."""

import json

import numpy as np
import pytest
from PIL import Image

from maskdit_jax import evaluate as command
from maskdit_jax.data.images import ENLARGE, save_png
from maskdit_jax.errors import UserError
from maskdit_jax.evaluation import certify
from maskdit_jax.evaluation.features import PIXELS
from maskdit_jax.evaluation.reference import make_reference, write_reference
from maskdit_jax.evaluation.sample_card import PAIRS, describe, evaluate_samples, metric_label
from maskdit_jax.evaluation.sample_set import open_samples

ABOUT = {
    "format": 1, "model": "MaskDiT-S/2", "workdir": "runs/x", "step": 400, "weights": "ema",
    "weights_digest": "00ff", "weak": None, "precision": "float32", "nfe": 79,
    "sampler": {"solver": "heun", "cfg_scale": 1.5},
    "seeds": "0-39", "labels": "balanced", "num_classes": 10,
    "dtype": "uint8", "num_samples": 40, "versions": {"jax": "0.10.2"}, "finished": True,
}  # fmt: skip
NEIGHBOURLY = ("kid", "precision", "recall", "density", "coverage")


def some_images(count: int, seed: int) -> np.ndarray:
    """Grey images [n, 8, 8, 1] of few degrees of freedom."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 255, (count, 2, 2, 1))
    return low.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)


@pytest.fixture
def real(tmp_path):
    """A reference of 300 images, all of them kept; its file and the images."""
    images = some_images(300, seed=1)
    write_reference(tmp_path / "ref.npz", make_reference([images], 300, PIXELS, origin="squares"))
    return tmp_path / "ref.npz", images


@pytest.fixture
def samples(tmp_path, real):
    """What `sample` writes as npz: 40 images, of which the first is a real one."""
    images = np.concatenate([real[1][7:8], some_images(39, seed=2)])
    (tmp_path / "out").mkdir()
    np.savez(tmp_path / "out/samples.npz", arr_0=images, arr_1=np.arange(40))
    (tmp_path / "out/samples.json").write_text(json.dumps(ABOUT))
    return tmp_path / "out", images


def test_the_card_says_what_was_measured_and_how(samples, real, capsys):
    """By the command: file, lines, picture."""
    (folder, images), (reference, real_images) = samples, real
    command.main([f"--samples={folder}", f"--reference={reference}"])
    card = json.loads((folder / "card.json").read_text())
    assert set(card["metrics"]) == {metric_label(name, 40, "pixels") for name in ("fid", *NEIGHBOURLY)}
    assert card["metrics"]["FID-40 (pixels)"] > 0
    assert card["samples"] == ABOUT | {"path": str(folder)}
    assert card["extractor"] == {"name": "pixels", "sha256": ""}
    assert {"count": 300, "kept": 300, "origin": "squares"}.items() <= card["reference"].items()
    assert len(card["reference"]["sha256"]) == 64 and set(card["versions"]) >= {"jax", "flax", "maskdit_jax"}
    fewer, small, kept = card["warnings"]
    assert fewer.startswith("40 samples") and "300 real images" in small and "against 300 real" in kept
    said = capsys.readouterr().out
    for fragment in ("FID-40", "balanced", "0-39", "nfe", "79", "400", "ema", "cfg_scale=1.5", "warning: 40"):
        assert fragment in said
    picture = np.asarray(Image.open(folder / "card.png"))[::ENLARGE, ::ENLARGE]
    assert picture.shape == (PAIRS // 4 * 9 + 1, 8 * 9 + 1)
    np.testing.assert_array_equal(picture[1:9, 1:9], images[0, ..., 0])
    np.testing.assert_array_equal(picture[1:9, 10:18], real_images[7, ..., 0])  # its neighbour is itself


@pytest.mark.parametrize(
    "count, extractor, name",
    [
        (50_000, "inception", "FID-50k"),
        (1437, "inception", "FID-1437"),
        (500, "inception", "FID-500"),
        (2000, "pixels", "FID-2k (pixels)"),
    ],
)
def test_the_number_of_samples_is_in_the_name(count, extractor, name):
    assert metric_label("fid", count, extractor) == name


def test_pngs_and_arrays_of_the_same_samples_score_alike(samples, real, tmp_path):
    """Also in batches of another size, and the first of more."""
    folder, images = samples
    card = evaluate_samples(folder, real[0])
    for seed, image in enumerate(np.concatenate([images, images])):
        place = folder / f"{seed // 1000 * 1000:06d}"
        place.mkdir(exist_ok=True)
        save_png(place / f"{seed:06d}.png", image)
    save_png(folder / "grid.png", images[0])  # is none of them
    (folder / "samples.npz").unlink()
    assert open_samples(folder, 41).count == 41
    as_png = evaluate_samples(folder, real[0], num_samples=40, batch_size=1)
    assert as_png["metrics"] == pytest.approx(card["metrics"], rel=1e-9)


def test_features_of_another_network_stand_for_samples(samples, real, tmp_path):
    """And for the reference: then the numbers are those of the extractor that made them."""
    (folder, images), (reference, real_images) = samples, real
    np.savez(tmp_path / "real.npz", features=PIXELS.extract(real_images)["pool"])
    np.savez(tmp_path / "mine.npz", features=PIXELS.extract(images)["pool"].astype(np.float16))
    card = evaluate_samples(
        None, tmp_path / "real.npz", features=tmp_path / "mine.npz", out=tmp_path / "card.json"
    )
    expected = evaluate_samples(folder, reference)["metrics"]
    as_ours = {name.replace("features", "pixels"): value for name, value in card["metrics"].items()}
    assert as_ours == pytest.approx(expected, rel=0.02, abs=0.02)
    assert card["extractor"]["name"].endswith("mine.npz") and len(card["extractor"]["sha256"]) == 64
    assert not (tmp_path / "card.png").exists()
    np.savez(tmp_path / "short.npz", features=np.zeros((39, 64), np.float32))
    with pytest.raises(UserError, match=r"features of 39 samples, .* has 40"):
        evaluate_samples(folder, tmp_path / "real.npz", features=tmp_path / "short.npz")


def test_what_is_not_customary_is_warned_of(real, tmp_path):
    """A foreign folder of larger, coloured images: their pixels give no number, features do."""
    folder = tmp_path / "pictures/a"
    folder.mkdir(parents=True)
    for i in range(8):
        save_png(folder / f"{i}.png", np.full((16, 16, 3), i, np.uint8))
    with pytest.raises(
        UserError, match=r"samples 16×16×3 have 768 features by 'pixels', the reference's are 64"
    ):
        evaluate_samples(folder.parent, real[0])
    np.savez(tmp_path / "flat.npz", features=np.random.default_rng(0).normal(size=(8, 64)))
    card = evaluate_samples(folder.parent, real[0], features=tmp_path / "flat.npz", metrics=["fid"])
    said = " | ".join(card["warnings"])
    assert "samples are 16×16×3, images of the reference 8×8×1" in said and "no samples.json" in said
    assert "precision" not in said and "warning: 8 samples" in describe(card)


def test_the_card_of_a_foreign_folder_is_beside_it(tmp_path):
    """In it, its picture would be one of the images to be measured next time."""
    (tmp_path / "pictures").mkdir()
    assert command.default_card(tmp_path / "pictures") == tmp_path / "pictures_card.json"


def test_a_reference_of_inception_asks_for_its_weights(samples, tmp_path, capsys):
    np.savez(tmp_path / "edm.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(SystemExit):
        command.main([f"--samples={samples[0]}", f"--reference={tmp_path / 'edm.npz'}"])
    assert "needs features by Inception. FID needs the weights pt_inception-2015" in capsys.readouterr().err


def test_certification_compares_with_published_numbers(samples, real, tmp_path):
    """Of files under the published names; here by pixels, with other numbers."""
    with pytest.raises(UserError, match=f"lacks {certify.REFERENCE} and {certify.SAMPLES}, to be had from"):
        certify.certify(tmp_path, PIXELS)
    real[0].rename(tmp_path / certify.REFERENCE)
    (samples[0] / "samples.npz").rename(tmp_path / certify.SAMPLES)
    measured = evaluate_samples(tmp_path / certify.SAMPLES, tmp_path / certify.REFERENCE)["metrics"]
    near, far = (certify.Published(measured["FID-40 (pixels)"] + off, 0.005) for off in (0.004, 0.006))
    rows = certify.certify(tmp_path, PIXELS, published={"fid": near, "recall": certify.Published(2, 0.005)})
    assert [row.agrees for row in rows] == [True, False]
    table = certify.describe(rows)
    assert "-0.00400     0.005\n" in table and "differs\nprecision and recall were" in table
    assert not certify.Row("fid", measured["FID-40 (pixels)"], far).agrees
    assert not certify.Row("fid", float("nan"), near).agrees
