"""The evaluation card of the digits run: what was measured, how, and what the real data score."""

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maskdit_jax.api import load
from maskdit_jax.config import ConfigDict
from maskdit_jax.data.images import save_png
from maskdit_jax.data.sources import Digits, parse_digits
from maskdit_jax.distributed.hosts import from_first
from maskdit_jax.errors import UserError, first_line
from maskdit_jax.evaluation.manifold import nearest
from maskdit_jax.evaluation.metrics import feature_statistics, frechet_distance
from maskdit_jax.files import appears_whole, read_json
from maskdit_jax.log import log
from maskdit_jax.sampling import Model
from maskdit_jax.training.checkpoint import FOLDER, open_run
from maskdit_jax.training.report import sample_grid

CARD, GRID = "card.json", "samples.png"


def finish(workdir: Path) -> None:
    """Sample grid and, if the run asks for one, evaluation card of the run's newest checkpoint.

    Only what is missing or older than the checkpoint is made; the card is printed in any case. All
    processes of the run sample, the first one writes.
    """
    checkpoints = open_run(workdir)
    step, meta, _ = checkpoints.newest_healthy(lambda *_: None)
    checkpoints.close()
    card_file, grid_file = workdir / CARD, workdir / GRID
    card = _read_card(card_file) if card_file.exists() else {}
    config = ConfigDict(meta["config"])
    wanted = config.evaluation.num_samples
    saved_at = (workdir / FOLDER / str(step)).stat().st_mtime
    grid_is_new = grid_file.exists() and grid_file.stat().st_mtime >= saved_at
    if from_first(not grid_is_new or bool(wanted and card.get("step") != step)):
        model = load(workdir)
        grid = sample_grid(model)
        card = digits_card(model, wanted) if wanted else {}
        if jax.process_index() > 0:
            return
        save_png(grid_file, grid)
        if wanted:
            card = {
                "step": step,
                **card,
                "training_s": meta["seconds"],
                "training_images_per_s": meta["items_consumed"] / meta["seconds"],
            }
            with appears_whole(card_file) as partial:
                partial.write_text(json.dumps(card, indent=1))
    if card:
        log.info(describe_card(card))
    log.info(
        f"finished at step {step:,}: samples in {grid_file}" + (f", card in {card_file}" if card else "")
    )


def _read_card(file: Path) -> dict[str, Any]:
    """The card that is there, for it to be printed again; empty, with a warning, where it is damaged."""
    try:
        card = read_json(file)
        describe_card(card)
    except (UserError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        problem = error if isinstance(error, UserError) else f"{file} is no card: {first_line(error, 100)}"
        log.warning(f"warning: {problem}; it is passed over, and made anew where the run asks for one")
        return {}
    return card


def digits_card(model: Model, num_samples: int) -> dict[str, Any]:
    """Measure samples of seeds 0 … num_samples - 1, with the labels of the run's training images in turn.

    class_share: share of samples that a support vector machine, trained on the real training split,
    assigns to the class asked for. In pixel space: frechet_distance to the held-out digits of the
    run's classes, beside that of the real training split, which a perfect model could reach;
    nearest_training_image, the mean distance to the nearest image that the run was trained on, beside that
    of the held-out digits: samples much nearer than these are copies.
    """
    from sklearn.svm import SVC  # scikit-learn is slow to import

    classes, count = parse_digits(model.config.data.source)
    every, seen = Digits("train"), Digits("train", classes, count)
    real, held_out = Digits("train", classes), Digits("held_out", classes)
    classifier = SVC().fit(_features(every.images), every.labels)
    statistics = feature_statistics(_features(held_out.images))

    def measure(images: np.ndarray) -> dict[str, float]:
        features = _features(images)
        return {
            "frechet_distance": frechet_distance(*feature_statistics(features), *statistics),
            "nearest_training_image": float(nearest(features, _features(seen.images))[0].mean()),
        }

    seeds, labels = np.arange(num_samples), np.resize(seen.labels, num_samples)
    guided_scale, results = model.sampler_options().cfg_scale, {}
    for name, scale in {"guided": guided_scale, "unguided": 1.0}.items():
        if name == "guided" and scale == 1:
            continue
        started = time.monotonic()
        images = model.sample(
            seeds,
            labels if model.shape.num_classes else None,
            cfg_scale=scale,
            batch_size=-(-512 // model.mesh.size),
        )
        results[name] = {
            "cfg_scale": scale,
            "class_share": float((classifier.predict(_features(images)) == labels).mean()),
            **measure(images),
            "sampling_s": time.monotonic() - started,
        }
    return {
        "num_samples": num_samples,
        "seeds": [0, num_samples - 1],
        "source": model.config.data.source,
        "sampler": model.config.sampling.to_dict(),
        **results,
        "classifier_accuracy_on_held_out": classifier.score(_features(held_out.images), held_out.labels),
        "real_train_frechet_distance": measure(real.images)["frechet_distance"],
        "held_out": measure(held_out.images),
    }


def _features(images: np.ndarray) -> np.ndarray:
    """Pixels [n, H·W] of images in [-1, 1], clipped to the range real ones have."""
    return np.clip(images, -1, 1).reshape(len(images), -1)


def describe_card(card: dict[str, Any]) -> str:
    """The card as lines for a person."""
    real = card["real_train_frechet_distance"]
    others = ["nearest_training_image"]
    lines = [
        f"evaluation card ({card['num_samples']} samples, {card['sampler']['num_steps']} "
        f"{card['sampler']['solver']} steps)",
        f"  classifier on held-out real digits  {card['classifier_accuracy_on_held_out']:.3f}",
        f"  Fréchet distance of real training digits to held-out ones  {real:.3f}",
        *(f"  {_words(name)} of held-out digits  {card['held_out'][name]:.3f}" for name in others),
    ]
    for name in (name for name in ("guided", "unguided") if name in card):
        r = card[name]
        lines.append(
            f"  {name:<8} (cfg_scale {r['cfg_scale']:g})  class share {r['class_share']:.3f}  Fréchet "
            f"distance {r['frechet_distance']:.3f} = {r['frechet_distance'] / real:.2f} × real"
            + "".join(f"  {_words(name)} {r[name]:.3f}" for name in others)
        )
    lines.append(f"  training {card['training_s']:.0f} s, {card['training_images_per_s']:,.0f} images/s")
    return "\n".join(lines)


def _words(name: str) -> str:
    return name.replace("_", " ")
