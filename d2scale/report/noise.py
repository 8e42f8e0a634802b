"""How far a result would move on other images of the same kind: a bootstrap over images.

Each resample draws as many images as the test set has, with replacement. Runs on the same images
share their draws, so the noise of a difference is much smaller than that of its parts: what an easy
image adds, it adds to both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from d2scale.coco.accumulate import accumulate, summarize
from d2scale.coco.matching import match
from d2scale.report.detections import RunDetections

RESAMPLES = 200
# The share of resamples that lies inside a band.
COVERAGE = 0.95
_SEED = 0

Band = tuple[float, float]  # low and high, percent


class Noise(NamedTuple):
    """Metrics in percent: published columns and ``AP-name`` of every class; nan without boxes."""

    exact: Mapping[str, float]  # of all images as they are
    draws: Mapping[str, np.ndarray]  # of each resample of the images, shape (resamples,)

    def band(self, name: str, minus: float = 0.0) -> Band | None:
        """Return the range that holds :data:`COVERAGE` of the resamples, less ``minus``."""
        return _around(self.exact[name] - minus, self.draws[name]) if name in self.draws else None

    def half_width(self, name: str) -> float | None:
        """Return half of the band's width."""
        band = self.band(name)
        return None if band is None else (band[1] - band[0]) / 2

    def difference(self, other: Noise, name: str) -> Band | None:
        """Return the band of this minus ``other``, which must be on the same images."""
        if name not in self.draws or name not in other.draws:
            return None
        exact = self.exact[name] - other.exact[name]
        return _around(exact, self.draws[name] - other.draws[name])


def _around(exact: float, draws: np.ndarray) -> Band | None:
    """Return the range of the draws, moved to lie around ``exact``; None without any spread."""
    # The centre of the resamples lies above the result: the metric takes the best precision at or
    # beyond each recall, and the best of fewer different images is more often good by luck.
    known = draws[np.isfinite(draws)]
    if len(known) < 2 or not np.isfinite(exact):
        return None
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(known - known.mean(), (tail, 1 - tail))
    return exact + float(low), exact + float(high)


def bootstrap(detected: RunDetections, resamples: int = RESAMPLES) -> Noise:
    """Resample the images of a test set; the same images give the same draws to every run."""
    images = len(detected.dataset)
    rng = np.random.default_rng(_SEED)
    draws = rng.multinomial(images, np.full(images, 1 / images), size=resamples)
    # The first row counts every image once: the result itself.
    metrics = weighted_metrics(detected, np.insert(draws, 0, 1, axis=0))
    return Noise(
        {name: float(values[0]) for name, values in metrics.items()},
        {name: values[1:] for name, values in metrics.items()},
    )


def weighted_metrics(detected: RunDetections, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Compute the official COCO metric, percent, with each image counted several times.

    ``counts`` has shape (draws, images), int64; the values by column have shape (draws,).
    """
    names, max_dets = detected.dataset.class_names, detected.max_dets
    matches = match(detected.dataset.truth, detected.detections, max_dets)
    curves = accumulate(matches, len(names), max_dets, counts, average=True)
    return summarize(curves, {name: number for number, name in enumerate(names)})
