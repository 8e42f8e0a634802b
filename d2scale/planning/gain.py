"""What a step of another total batch is worth. Numbers in, numbers out.

A step of B images counts for r of the recipe's steps, which have B0 images, with the gain::

    r = (V / B0 + M2) / (V / B + M2)

of AdaScale SGD (Johnson et al., ICML 2020, arXiv 2007.05105). V is the trace of the covariance of
one image's gradient, M2 the squared norm of the true gradient, and V / M2 the noise scale
(McCandlish et al., arXiv 1812.06162): the images at which a batch's noise equals its signal.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple


class NoisePoint(NamedTuple):
    """The noise scale at a moment of a training."""

    recipe_steps: float  # of the recipe that were done
    noise_scale: float  # images; may be infinite


def noise_scale(variance: float, signal: float) -> float:
    """Return V / M2 in images: 0 without noise, infinite where nothing but noise was measured.

    ``signal`` is an estimate, and so may be negative.
    """
    if variance <= 0:
        return 0.0
    return variance / signal if signal > 0 else math.inf


def gain_of(noise_scale: float, ims_per_batch: int, recipe_ims_per_batch: int) -> float:
    """Return how many of the recipe's steps a step is worth: between 1 and the batch ratio.

    >>> gain_of(0.0, 32, 8), gain_of(math.inf, 32, 8), gain_of(32.0, 32, 8)
    (1.0, 4.0, 2.5)
    """
    if math.isinf(noise_scale):
        return ims_per_batch / recipe_ims_per_batch
    return (noise_scale / recipe_ims_per_batch + 1) / (noise_scale / ims_per_batch + 1)


def recipe_steps(images: float, recipe_ims_per_batch: float) -> float:
    """Return the recipe's steps that so many of its images are.

    A whole number but for rounding is one: a training shall not take a step more for 1e-12.
    """
    steps = images / recipe_ims_per_batch
    return float(round(steps)) if math.isclose(steps, round(steps), rel_tol=1e-9) else steps


def efficiency(noise_scale: float, ims_per_batch: int, recipe_ims_per_batch: int) -> float:
    """Return the progress that an image makes in a batch over that in the recipe's batch.

    It is (noise scale + B0) / (noise scale + B), as in Pollux (OSDI 2021).
    """
    gain = gain_of(noise_scale, ims_per_batch, recipe_ims_per_batch)
    return gain * recipe_ims_per_batch / ims_per_batch


def range_of_steps(max_iter: int, ims_per_batch: int, recipe_ims_per_batch: int) -> tuple[int, int]:
    """Return the fewest and the most steps of ``ims_per_batch`` images, whatever they are worth."""
    fewest, most = sorted((max_iter, -(-max_iter * recipe_ims_per_batch // ims_per_batch)))
    return fewest, most


def steps_needed(
    noise: Sequence[NoisePoint], max_iter: int, ims_per_batch: int, recipe_ims_per_batch: int
) -> float:
    """Return the steps of ``ims_per_batch`` images that are worth the recipe's ``max_iter``.

    ``noise`` has one point at least, in order. A point stands for the steps since the one before,
    as a line in a log does, and the last one for all that follow.
    """
    return sum(
        (end - begin) / gain_of(scale, ims_per_batch, recipe_ims_per_batch)
        for begin, end, scale in _pieces(noise, max_iter)
    )


def typical_noise_scale(noise: Sequence[NoisePoint], max_iter: int) -> float:
    """Return the median noise scale over the recipe's ``max_iter`` steps, in images.

    ``noise`` is as for :func:`steps_needed`.
    """
    pieces = sorted((scale, end - begin) for begin, end, scale in _pieces(noise, max_iter))
    steps = accumulate(count for _, count in pieces)
    return pieces[bisect_left([*steps], max_iter / 2)][0]


def _pieces(noise: Sequence[NoisePoint], max_iter: int) -> Iterator[tuple[float, float, float]]:
    """Yield begin and end, in the recipe's steps, and noise scale of each part of a training."""
    count = bisect_left([point.recipe_steps for point in noise], max_iter)
    points = [*noise[:count], noise[min(count, len(noise) - 1)]]
    ends = [0.0, *(point.recipe_steps for point in points[:-1]), float(max_iter)]
    for (begin, end), point in zip(pairwise(ends), points, strict=True):
        yield begin, end, point.noise_scale
