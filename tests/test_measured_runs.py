"""Measurements of a run: during training, the best weights by them, the card of any source."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from readers import write_moments
from test_resume import train
from tiny import REPORTED, all_files, call_tool, refusal, steps_of, tiny_config

from maskdit_jax import load
from maskdit_jax.data.codec import Codec
from maskdit_jax.data.images import to_uint8
from maskdit_jax.data.sources import Digits
from maskdit_jax.distributed.mesh import make_mesh
from maskdit_jax.errors import UserError
from maskdit_jax.evaluation import card
from maskdit_jax.evaluation.features import PIXELS
from maskdit_jax.evaluation.measure import measure
from maskdit_jax.evaluation.monitor import Monitor
from maskdit_jax.evaluation.reference import read_reference
from maskdit_jax.sampling import Model
from maskdit_jax.training.best import Best
from maskdit_jax.training.checkpoint import Checkpoints

NAME = f"frechet_pixels_{REPORTED['evaluation.during_samples']}"
MEASURED = [f"evaluation.{name}" for name in ("every_steps", "during_samples", "keep_best")]
STEPS = [4, 8]  # at which the finished run was measured


def scores(said: str) -> dict[int, str]:
    """What the command said of each measured step."""
    return {int(step): score for step, score in re.findall(rf"^step (\d+): {NAME} ([\d.]+)", said, re.M)}


def meta_of(workdir: Path, step: int) -> dict:
    checkpoints = Checkpoints(workdir)
    meta = checkpoints.meta(step)
    checkpoints.close()
    return meta


def test_measurements_are_said_and_the_best_weights_kept(finished):
    run, said = finished
    found = scores(said)
    assert list(found) == STEPS
    best = min(found, key=lambda step: float(found[step]))
    assert steps_of(run / "best") == [best]
    there, here = (meta_of(folder, best) for folder in (run / "best", run))
    assert f"{there['best']['score']:.4f}" == found[best]
    assert there["items_consumed"] == here["items_consumed"]
    # Digests of values: these are the weights and the EMA of that step, which `load` reads.
    assert all(there["digests"][name] == here["digests"][name] for name in ("params", "ema_params"))
    assert load(run / "best").origin.step == best


@pytest.mark.slow
def test_killed_run_measures_the_same_again_and_keeps_the_same_weights(finished, tmp_path, capsys):
    """Killed after the second measurement, gone on with from the first one's checkpoint."""
    run, said = finished
    shutil.copytree(run / "checkpoints/4", tmp_path / "checkpoints/4")
    shutil.copytree(run / "best", tmp_path / "best")
    before = all_files(tmp_path / "best")
    train(tmp_path, {name: x for name, x in REPORTED.items() if name in MEASURED})
    again = capsys.readouterr().out
    assert f"best so far: {NAME} {min(scores(said).values(), key=float)} at step " in again
    assert scores(again) == {8: scores(said)[8]}
    assert all_files(tmp_path / "best") == before


@pytest.fixture
def best(run, tmp_path):
    """The folder of the best weights, to spoil, and what the run chose by."""
    shutil.copytree(run / "best", tmp_path / "run/best")
    (step,) = steps_of(tmp_path / "run/best")
    file = tmp_path / f"run/best/checkpoints/{step}/meta/metadata"
    return tmp_path / "run", file, json.loads(file.read_text())["best"]


def test_the_best_weights_are_no_run_to_continue(best, capsys):
    folder = best[0] / "best"
    before = all_files(folder)
    error = refusal(capsys, train, folder)
    assert f"{folder} holds the best weights of one, not a run to continue" in error
    assert f"--config.init_from={folder}" in error
    assert {p: x for p, x in all_files(folder).items() if p.name != ".lock"} == before


def test_scores_of_another_measurement_or_damaged_ones_are_not_compared(best, messages, caplog):
    workdir, file, chosen = best
    kept = Best(workdir, chosen["metric"], chosen["reference"])
    assert kept.score == chosen["score"]
    kept.close()
    other = Best(workdir, "fid_50000", chosen["reference"])
    assert (other.score, other.step) == (np.inf, kept.step)
    other.close()
    file.write_text(file.read_text().replace(chosen["metric"], "fid_50000"))
    damaged = Best(workdir, "fid_50000", chosen["reference"])
    assert damaged.score == np.inf
    assert "cannot be read; the next measurement takes its place" in caplog.text
    damaged.close()


def test_reference_of_other_features_is_refused_before_training(tmp_path):
    np.savez(tmp_path / "ref.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    config = tiny_config({"evaluation.every_steps": 4, "evaluation.reference": tmp_path / "ref.npz"})
    with pytest.raises(UserError, match="features by 'inception', the samples get them by 'pixels'"):
        Monitor(config, Codec("pixels", 1.0))


def test_reference_of_other_images_is_refused_before_training(tmp_path):
    about = {"count": 9, "extractor": "pixels", "extractor_digest": "", "origin": ""}
    np.savez(tmp_path / "ref.npz", mu=np.zeros(192), sigma=np.eye(192), about=np.array(json.dumps(about)))
    config = tiny_config({"evaluation.every_steps": 4, "evaluation.reference": tmp_path / "ref.npz"})
    with pytest.raises(UserError, match="has 192 features of an image, those of this run have 64"):
        Monitor(config, Codec("pixels", 1.0))


def write_squares(folder, classes: list[str], count: int = 30) -> np.ndarray:
    """PNGs of 8×8 pixels, of each class around a brightness of its own; all of them in the sources' order."""
    rng, images = np.random.default_rng(0), []
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        drawn = rng.normal(60 + 120 * number, 12, (count, 8, 8, 3)).clip(0, 255).astype(np.uint8)
        for i, image in enumerate(drawn):
            Image.fromarray(image).save(folder / name / f"{i:02d}.png")
        images.append(drawn)
    return np.concatenate(images)


@pytest.mark.parametrize("classes", [["a", "b"], [""]], ids=["classes", "no classes"])
def test_card_of_a_folder(classes, tmp_path, monkeypatch):
    """Samples that are its images: near them, and of the class asked for, where there are classes."""
    images = write_squares(tmp_path / "in", classes).astype(np.float32) / 127.5 - 1
    num_classes = len(classes) if len(classes) > 1 else 0
    options = {
        "data.source": f"folder:{tmp_path / 'in'}",
        "data.channels": 3,
        "data.num_classes": num_classes,
    }
    asked = []

    def samples(model, labels, count, cfg_scale):
        asked.append(labels)
        rows = np.arange(count) % 30 if labels is None else 30 * labels + np.arange(count) % 30
        yield from np.split(images[rows], [7])

    monkeypatch.setattr(card, "sample_batches", samples)
    model = Model(tiny_config(options), {}, make_mesh(1, 1), Codec("pixels", 1.0))
    found = card.evaluation_card(model, 40)
    assert found["reference"].startswith(f"{len(images) // 2} of the {len(images)} training items of folder:")
    unguided = found["unguided"]
    assert 0 <= unguided["frechet_distance"] < 5 * found["real_train_frechet_distance"]
    assert unguided["nearest_training_image"] < found["held_out"]["nearest_training_image"]
    described = card.describe_card(found | {"training_s": 1.0, "training_images_per_s": 2.0})
    assert f"distances of pixels from {found['reference']}" in described
    if num_classes:
        assert unguided["class_share"] == found["classifier_accuracy_on_held_out"] == 1.0
        assert set(asked[0]) == {0, 1}
    else:
        assert asked == [None]
        assert "class" not in " ".join(unguided) and "class share" not in described


def test_card_of_latents_compares_latents(tmp_path, monkeypatch):
    """Without an autoencoder there is nothing else; 5 of the 10 views of images are the reference."""
    folder = write_moments(tmp_path)
    options = {"data.space": "latents", "data.image_size": 4, "data.channels": 3, "data.num_classes": 5}
    config = tiny_config(options | {"data.source": f"latents:{folder}"})
    drawn = np.random.default_rng(0).normal(size=(8, 4, 4, 3)).astype(np.float32)
    monkeypatch.setattr(card, "sample_batches", lambda *_: iter([drawn]))
    model = Model(config, {}, make_mesh(1, 1), Codec("latents", config.data.latent_scale))
    found = card.evaluation_card(model, 8)
    assert found["features"] == "latents"
    assert found["reference"] == f"5 of the 10 training items of latents:{folder}"
    assert found["unguided"]["frechet_distance"] > found["real_train_frechet_distance"]


def test_reference_of_a_command_is_what_its_images_say(tmp_path, monkeypatch, capsys):
    """Of the held-out digits, and of the same images in a file: the same statistics."""
    images = to_uint8(Digits("held_out").images)
    np.savez(tmp_path / "in.npz", arr_0=images)
    for name, *flags in (("a", "--source=digits", "--held_out"), ("b", f"--images={tmp_path / 'in.npz'}")):
        out = f"--out={tmp_path / name}.npz"
        call_tool(monkeypatch, "reference_stats", out, "--features=pixels", "--num_kept=50", *flags)
        assert "360 images of" in capsys.readouterr().out
    first, second = (read_reference(tmp_path / f"{name}.npz") for name in "ab")
    assert (first.count, first.extractor, len(first.features)) == (360, "pixels", 50)
    assert first.origin == "digits, held out"
    np.testing.assert_array_equal(first.images, second.images)
    np.testing.assert_array_equal(PIXELS.extract(first.images)["pool"], first.features)
    np.testing.assert_array_equal(first.moments["pool"][1], second.moments["pool"][1])
    found = measure([images], PIXELS, first, ["fid", "precision", "coverage"])
    assert found["fid"] == pytest.approx(0, abs=1e-9)
    assert found["precision"] > 0.8 and found["coverage"] == 1.0
    with pytest.raises(UserError, match="sFID: the reference has no statistics of spatial"):
        measure([images], PIXELS, first, ["sfid"])
