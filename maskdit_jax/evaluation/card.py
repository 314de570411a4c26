"""The evaluation card at the end of a run: what was measured, how, and what the real data score."""

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from maskdit_jax.config import evaluation_of
from maskdit_jax.errors import UserError
from maskdit_jax.evaluation.features import Extractor
from maskdit_jax.evaluation.manifold import nearest
from maskdit_jax.evaluation.metrics import Moments, feature_statistics, frechet_distance
from maskdit_jax.evaluation.real import (
    compared_codec,
    features_of,
    open_extractor,
    real_data,
    sample_batches,
)
from maskdit_jax.evaluation.reference import read_reference
from maskdit_jax.sampling import Model

MAX_LEARNED, MAX_CLASSES = 3_000, 100  # items and classes that a support vector machine learns


class _Yardstick(NamedTuple):
    """What features of samples are compared with; classifier: None without classes."""

    extractor: Extractor
    statistics: tuple[np.ndarray, np.ndarray]
    seen: np.ndarray
    classifier: Any


def evaluation_card(model: Model, num_samples: int) -> dict[str, Any]:
    """Measure samples of seeds 0 … num_samples - 1, with the labels of the run's training images in turn.

    All in the features of config.evaluation: pixels (latents, where the model makes such) or Inception's.
    frechet_distance: to the held-out images or the reference file, beside that of real training images,
    which a perfect model could reach; nearest_training_image: the mean distance to the nearest image that
    the run was trained on, beside that of the held-out ones: samples much nearer than these are copies;
    class_share: share of samples that a support vector machine, trained on real images, assigns to the class
    asked for. For which images these are see `real_data`; where there are no classes, or more than
    MAX_CLASSES, no class_share.

    Raises:
      UserError: the data or files that the configuration names are not there, or do not fit.
    """
    config, evaluation = model.config, evaluation_of(model.config)
    codec = compared_codec(model.codec, evaluation)
    extractor = open_extractor(evaluation.features, evaluation.inception, config.data.space)
    model = Model(config, model.params, model.mesh, codec, model.origin)
    data = real_data(config)
    # Of most sources the last three are the same items.
    each = {id(real): real for real in data}
    found = {key: features_of(x, codec, extractor, config.data.num_threads) for key, x in each.items()}
    held_out, training, seen, labelled = (found[id(real)] for real in data)
    file = read_reference(evaluation.reference) if evaluation.reference else None
    if file:
        file.check_extractor(extractor)
    statistics = file.moments["pool"] if file else feature_statistics(held_out[0])
    classifier = _classifier(*labelled) if model.shape.num_classes else None
    yardstick = _Yardstick(extractor, statistics, seen[0], classifier)

    labels = np.resize(seen[1], num_samples) if model.shape.num_classes else None
    guided_scale, results = model.sampler_options().cfg_scale, {}
    for name, scale in {"guided": guided_scale, "unguided": 1.0}.items():
        if name == "guided" and scale == 1:
            continue
        started = time.monotonic()
        measured = _measure(sample_batches(model, labels, num_samples, scale), labels, yardstick)
        results[name] = {"cfg_scale": scale, **measured, "sampling_s": time.monotonic() - started}
    accuracy = {} if classifier is None else {"classifier_accuracy_on_held_out": classifier.score(*held_out)}
    return {
        "num_samples": num_samples,
        "seeds": [0, num_samples - 1],
        "labels": "none" if labels is None else "of the training images, in turn",
        "source": config.data.source,
        "features": extractor.name,
        "features_digest": extractor.digest,
        "reference": file.origin if file else data.held_out.origin,
        "reference_digest": file.digest if file else "",
        "sampler": config.sampling.to_dict(),
        **results,
        **accuracy,
        "real_train_frechet_distance": frechet_distance(*feature_statistics(training[0]), *statistics),
        "held_out": {
            "frechet_distance": frechet_distance(*feature_statistics(held_out[0]), *statistics),
            "nearest_training_image": float(nearest(held_out[0], seen[0])[0].mean()),
        },
    }


def _classifier(features: np.ndarray, labels: np.ndarray) -> Any:
    """A support vector machine that knows the classes of real features; None: they are too many, or one."""
    every = -(-len(labels) // MAX_LEARNED)
    features, labels = features[::every], labels[::every]
    if not 2 <= len(np.unique(labels)) <= MAX_CLASSES:
        return None
    from sklearn.svm import SVC  # scikit-learn is slow to import

    return SVC().fit(features, labels)


def _measure(
    batches: Iterable[np.ndarray], labels: np.ndarray | None, yardstick: _Yardstick
) -> dict[str, float]:
    """What the card says of samples that come in batches, in one pass."""
    moments, distances, predictions = Moments(), [], []
    for batch in batches:
        features = yardstick.extractor.extract(batch)["pool"]
        if not np.isfinite(features).all():
            raise UserError("evaluation: samples are not finite: have they been made with weights that are?")
        moments.add(features)
        distances.append(nearest(features, yardstick.seen)[0])
        if yardstick.classifier is not None:
            predictions.append(yardstick.classifier.predict(features))
    share = {"class_share": float((np.concatenate(predictions) == labels).mean())} if predictions else {}
    return share | {
        "frechet_distance": frechet_distance(moments.mean, moments.cov, *yardstick.statistics),
        "nearest_training_image": float(np.concatenate(distances).mean()),
    }


def describe_card(card: dict[str, Any]) -> str:
    """The card as lines for a person."""
    real = card["real_train_frechet_distance"]
    features = card.get("features", "pixels")
    kind = "digits" if str(card.get("source", "digits")).startswith("digits") else "images"
    lines = [
        f"evaluation card ({card['num_samples']} samples, {card['sampler']['num_steps']} "
        f"{card['sampler']['solver']} steps)",
    ]
    if kind != "digits" or features != "pixels":
        lines.append(f"  distances of {features} from {card['reference']}")
    if "classifier_accuracy_on_held_out" in card:
        lines.append(f"  classifier on held-out real {kind}  {card['classifier_accuracy_on_held_out']:.3f}")
    lines += [
        f"  Fréchet distance of real training {kind} to held-out ones  {real:.3f}",
        f"  nearest training image of held-out {kind}  {card['held_out']['nearest_training_image']:.3f}",
    ]
    for name in (name for name in ("guided", "unguided") if name in card):
        r = card[name]
        share = f"class share {r['class_share']:.3f}  " if "class_share" in r else ""
        distance = r["frechet_distance"]
        lines.append(
            f"  {name:<8} (cfg_scale {r['cfg_scale']:g})  {share}Fréchet distance {distance:.3f} = "
            f"{distance / real:.2f} × real  nearest training image {r['nearest_training_image']:.3f}"
        )
    lines.append(f"  training {card['training_s']:.0f} s, {card['training_images_per_s']:,.0f} images/s")
    return "\n".join(lines)
