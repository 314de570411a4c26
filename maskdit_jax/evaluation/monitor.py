"""One number for a model in training: the Fréchet distance of its samples from real data."""

import math

import numpy as np

from maskdit_jax.config import ConfigDict, evaluation_of
from maskdit_jax.data.codec import Codec
from maskdit_jax.distributed.hosts import from_first
from maskdit_jax.errors import UserError
from maskdit_jax.evaluation.measure import measure
from maskdit_jax.evaluation.real import (
    compared_codec,
    open_extractor,
    open_reference,
    real_data,
    sample_batches,
)
from maskdit_jax.log import log
from maskdit_jax.sampling import Model


class Monitor:
    """Measures models of one configuration, always by the same seeds and labels, without guidance.

    name: of the number, with that of the samples: fid_5000, or frechet_pixels_1000 where pixels are compared;
    reference: what distinguishes the reference from others; codec: that of the models to be measured. All
    processes of a run make one, and measure, together; each holds all samples, one batch at a time.
    """

    def __init__(self, config: ConfigDict, codec: Codec):
        """
        Raises:
          UserError: the data, the reference or the weights of the extractor are not there, or do not fit.
        """
        evaluation = evaluation_of(config)
        self.codec, self._count = compared_codec(codec, evaluation), evaluation.during_samples
        self._extractor = open_extractor(evaluation.features, evaluation.inception, config.data.space)
        held_out = real_data(config).held_out
        self._reference, labels = open_reference(config, held_out, self.codec, self._extractor)
        self.reference = self._reference.digest or self._reference.origin
        kind = "fid" if self._extractor.name == "inception" else f"frechet_{self._extractor.name}"
        self.name = f"{kind}_{self._count}"
        # Classes in the shares that they have there; a file does not tell, and all come in turn.
        follows = labels is not None and config.data.num_classes
        self._labels = np.resize(np.asarray(labels), self._count) if follows else None
        log.info(f"every {evaluation.every_steps:,} steps: {self.name}, from {self._reference.origin}")

    def score(self, model: Model) -> float:
        """The distance, the same in every process; NaN, with a warning, where samples are not finite."""
        batches = sample_batches(model, self._labels, self._count, cfg_scale=1.0)
        try:
            value = measure(batches, self._extractor, self._reference, ["fid"])["fid"]
        except UserError as error:
            log.warning(f"warning: {self.name} could not be measured: {error}")
            value = math.nan
        # Eigenvalues may differ in the last bit between hosts.
        return from_first(value)
