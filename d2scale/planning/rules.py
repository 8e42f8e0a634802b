"""How the numbers of a recipe follow a change of the total batch. Numbers in, numbers out.

With k = B / B0, the batch ratio, a count of iterations keeps the images it stands for: it is
divided by k. The learning rate follows "Accurate, Large Minibatch SGD" (arXiv 1706.02677,
linear) or the square-root rule for Adam-like optimizers ("On the SDEs and Scaling Rules for
Adaptive Gradient Algorithms", arXiv 2205.10287).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

LR_RULE = "D2SCALE.LR_RULE"
VIRTUAL_RANKS = "D2SCALE.VIRTUAL_RANKS"
# gain is followed while training: see planning/gain.py.
LR_RULES = ("auto", "linear", "sqrt", "none", "gain")


def split_evenly(total: int, parts: int) -> tuple[int, ...]:
    """Split ``total`` into ``parts`` whole numbers that differ by at most one, largest first.

    >>> split_evenly(16, 3)
    (6, 5, 5)
    """
    least, rest = divmod(total, parts)
    return tuple(least + (part < rest) for part in range(parts))


def micro_batch_sizes(total: int, world_size: int, ims_per_gpu: int) -> tuple[tuple[int, ...], ...]:
    """Divide ``total`` images of one optimizer step over ranks and their micro-batches.

    Returned are, for each rank, the sizes of its micro-batches, as few and as even as possible
    with at most ``ims_per_gpu`` images each. ``total`` is at least ``world_size``.

    >>> micro_batch_sizes(16, 3, 4)
    ((3, 3), (3, 2), (3, 2))
    """
    of_ranks = split_evenly(total, world_size)
    return tuple(split_evenly(images, -(-images // ims_per_gpu)) for images in of_ranks)


def own_virtual_ranks(count: int, rank: int, world_size: int) -> range:
    """Return which of the recipe's ``count`` ranks one of ``world_size`` ranks runs.

    ``world_size`` is at most ``count``.

    >>> own_virtual_ranks(8, 1, 3)
    range(3, 6)
    """
    shares = split_evenly(count, world_size)
    start = sum(shares[:rank])
    return range(start, start + shares[rank])


def micro_batch_counts(images: int, ims_per_gpu: int) -> tuple[int, ...]:
    """Return the numbers of micro-batches that one rank's images can be cut into.

    >>> micro_batch_counts(5, 4)
    (2, 3, 5)
    """
    return tuple(sorted({-(-images // size) for size in range(1, min(images, ims_per_gpu) + 1)}))


def resolve_lr_rule(rule: str, optimizer: str, *, prefers_gain: bool = False) -> str:
    """Turn ``auto`` into the rule that suits the optimizer.

    That is sqrt if it is Adam-like, gain for SGD where the caller ``prefers_gain``, else linear.
    """
    if rule != "auto":
        return rule
    if optimizer.lower().startswith("adam"):
        return "sqrt"
    return "gain" if prefers_gain and gain_is_proven_for(optimizer) else "linear"


def gain_is_proven_for(optimizer: str) -> bool:
    """Return whether the gain rule's theory holds for an optimizer: it is that of SGD."""
    return optimizer.lower().startswith("sgd")


def scale_learning_rate(learning_rate: float, ratio: Fraction, rule: str) -> float:
    """Return the learning rate per step for a batch ``ratio`` times as large."""
    if rule == "linear":
        # The decimal that the user wrote, not its nearest double: 0.01 * 15/8 is 0.01875.
        return float(Fraction(repr(learning_rate)) * ratio)
    if rule == "sqrt":
        return learning_rate * math.sqrt(ratio)
    return learning_rate


def scale_count(iterations: int, ratio: Fraction) -> int:
    """Scale a period or a moment: same images, rounded, and 0 only if it was 0."""
    return max(1, round(iterations / ratio)) if iterations else 0


def scale_max_iter(max_iter: int, ratio: Fraction) -> int:
    """Return the smallest number of steps that shows at least the recipe's images."""
    return math.ceil(max_iter / ratio)


def scale_steps(steps: Sequence[int], ratio: Fraction, max_iter: int) -> tuple[int, ...]:
    """Scale the iterations at which the learning rate drops; they stay below ``max_iter``.

    Raises:
        ValueError: if there is no room for that many drops in ``max_iter`` iterations.
    """
    if len(steps) >= max_iter and steps:
        raise ValueError(f"{len(steps)} steps do not fit below {max_iter} iterations")
    scaled = [scale_count(step, ratio) for step in steps]
    for index in range(1, len(scaled)):
        scaled[index] = max(scaled[index], scaled[index - 1] + 1)
    limit = max_iter
    for index in reversed(range(len(scaled))):
        scaled[index] = limit = min(scaled[index], limit - 1)
    return tuple(scaled)


def scale_ema_decay(decay: float, ratio: Fraction) -> float:
    """Scale a decay per step, so that it forgets as much per image: decay to the power k."""
    return decay ** float(ratio)
