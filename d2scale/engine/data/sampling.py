"""Sample the images of each optimizer step, the same for any number of ranks.

The order is a function of the seed alone. Nothing here knows a rank, a worker or a device: the
loader of a rank takes its slice of a step (:func:`rank_slice`), and a run that continues with
another total batch goes on at the image where it stopped.

Random words come from numpy's PCG64 bit generator, whose stream numpy promises to keep, so that
a run can continue under another numpy version too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from d2scale.errors import CheckpointError, Fault
from d2scale.planning.rules import split_evenly

# Keep the streams for different purposes apart.
_ORDER_STREAM = 0
_IMAGE_STREAM = 1


class Draw(NamedTuple):
    """One image of a step: its number in the dataset, and the epoch that it was drawn in."""

    image: int
    epoch: int


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of ``range(size)``, shape (size,), int64."""
    words = _random_words(seed, (_ORDER_STREAM, epoch), size)
    return np.argsort(words, kind="stable")


def uniform_numbers(seed: int, epoch: int, image: int, count: int) -> np.ndarray:
    """Return numbers in [0, 1) for the augmentation of one image in one epoch, shape (count,)."""
    words = _random_words(seed, (_IMAGE_STREAM, epoch, image), count)
    return (words >> np.uint64(11)) * 2.0**-53


def _random_words(seed: int, key: tuple[int, ...], count: int) -> np.ndarray:
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    return np.asarray(np.random.PCG64(sequence).random_raw(count), dtype=np.uint64)


def rank_slice(total: int, world_size: int, rank: int) -> slice:
    """Return which of the ``total`` images of a step, or of a dataset, belong to ``rank``.

    >>> rank_slice(16, 3, 1)
    slice(6, 11, None)
    """
    sizes = split_evenly(total, world_size)
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


class StepSampler(Iterator[tuple[Draw, ...]]):
    """An endless stream of optimizer steps, each exactly ``ims_per_batch`` images.

    Every epoch shows every image once, in an order drawn from (seed, epoch). With ``groups``, a
    step holds images of one group only: each drawn image waits in its group until the group
    can fill a step, across the end of an epoch if need be.

    Args:
        size: images in the dataset.
        ims_per_batch: images in one step, over all ranks and micro-batches.
        seed: not negative; ValueError for a number out of its range.
        groups: group number of each image, shape (size,); None puts all images in one group.
    """

    def __init__(
        self, size: int, ims_per_batch: int, seed: int, *, groups: np.ndarray | None = None
    ) -> None:
        if size < 1 or ims_per_batch < 1 or seed < 0:
            raise ValueError(
                f"size and ims_per_batch must be positive and seed not negative, got "
                f"size={size}, ims_per_batch={ims_per_batch}, seed={seed}"
            )
        if groups is not None and len(groups) != size:
            raise ValueError(f"{len(groups)} group numbers for {size} images")
        self.size = size
        self.ims_per_batch = ims_per_batch
        self.seed = seed
        self.groups = np.zeros(size, dtype=np.int64) if groups is None else np.asarray(groups)
        self._start(epoch=0, position=0, waiting=())

    def _start(self, epoch: int, position: int, waiting: Sequence[Draw]) -> None:
        self._epoch = epoch
        self._position = position
        self._order = epoch_order(self.size, self.seed, epoch)
        self._waiting: list[list[Draw]] = [[] for _ in range(int(self.groups.max()) + 1)]
        for draw in waiting:
            self._waiting[self.groups[draw.image]].append(draw)

    def __next__(self) -> tuple[Draw, ...]:
        while (full_group := self._full_group()) is None:
            self._draw_image()
        step = tuple(full_group[: self.ims_per_batch])
        del full_group[: self.ims_per_batch]
        return step

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the stream: plain numbers and lists.

        ``waiting`` lists the images, with their epochs, that were drawn and not yet shown. The
        total batch is no part of it: a sampler with another one continues at the same image.
        """
        return {
            "size": self.size,
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self._position,
            "waiting": [list(draw) for group in self._waiting for draw in group],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position, and with the seed, of another sampler over the dataset.

        Raises CheckpointError if the state is none, or belongs to a dataset of another size.
        """
        try:
            numbers = (int(state[name]) for name in ("size", "seed", "epoch", "position"))
            size, seed, epoch, position = numbers
            waiting = [Draw(int(image), int(epoch)) for image, epoch in state["waiting"]]
            images = [draw.image for draw in waiting]
            in_range = position <= size and max(images, default=0) < size
            if min([seed, epoch, position, *images]) < 0 or not in_range:
                raise ValueError("numbers that no dataset of this size has")
        except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            advice = f"use another checkpoint ({type(error).__name__}: {error})"
            fault = Fault("sampler", state, "the state of a sampler", advice)
            raise CheckpointError([fault]) from error
        if size != self.size:
            allowed = f"{self.size}, the images of this run's training dataset"
            advice = "continue with the dataset that the run was started with"
            raise CheckpointError([Fault("sampler.size", size, allowed, advice)])
        self.seed = seed
        self._start(epoch, position, waiting)

    def _full_group(self) -> list[Draw] | None:
        return next((group for group in self._waiting if len(group) >= self.ims_per_batch), None)

    def _draw_image(self) -> None:
        if self._position == self.size:
            self._epoch += 1
            self._position = 0
            self._order = epoch_order(self.size, self.seed, self._epoch)
        image = int(self._order[self._position])
        self._waiting[self.groups[image]].append(Draw(image, self._epoch))
        self._position += 1
