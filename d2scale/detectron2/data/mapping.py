"""Samples made of dataset entries: whoever makes them, in whatever order, they are the same."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from d2scale.detectron2.data.from_upstream import LoaderParts
from d2scale.errors import DataError, Fault

logger = logging.getLogger(__name__)

_TRIES_BEFORE_WARNING = 3  # as detectron2 has it


class Request(NamedTuple):
    """The images of one virtual rank in one step, as numbers in the dataset."""

    step: int
    virtual_rank: int
    images: list[int]


class SeededMapping:
    """Makes the samples of a request: the map-style dataset that torch's loader gives its workers.

    Each sample is made from random streams of its own, a function of seed, step, virtual rank and
    place. An image for which the mapper returns None is replaced by another of its group.
    """

    def __init__(self, parts: LoaderParts, seed: int, group_of: Callable[[int], int]) -> None:
        self._parts = parts
        self._seed = seed
        self._group_of = group_of

    def __getitem__(self, request: Request) -> Any:
        """Return the samples, collated if the loader collates, or the error of the dataset."""
        try:
            samples = [self._sample(request, place) for place in range(len(request.images))]
        except DataError as error:
            # Raised, torch's loader would put its whole traceback into the message.
            return error
        if self._parts.collate is None:
            return samples
        with random_streams(self._seed, request.step, request.virtual_rank):
            return self._parts.collate(samples)

    def _sample(self, request: Request, place: int) -> Any:
        key = (request.step, request.virtual_rank, place)
        image = request.images[place]
        with random_streams(self._seed, *key):
            for tries, number in enumerate(chain([image], self._others(image, key)), start=1):
                sample = self._parts.mapper(self._parts.entries[number])
                if tries == _TRIES_BEFORE_WARNING and sample is None:
                    logger.warning("the mapper returned None for %d images in a row", tries)
                if sample is not None:
                    return sample
        advice = "look why the mapper refuses them"
        raise DataError([Fault("the mapper's sample", None, "one for some image", advice)])

    def _others(self, image: int, key: tuple[int, ...]) -> Iterator[int]:
        """Yield the other images of the group in an order of their own, for :meth:`_sample`."""
        sequence = np.random.SeedSequence(_unsigned(self._seed), spawn_key=(*key, 1))
        order = np.random.Generator(np.random.PCG64(sequence)).permutation(len(self._parts.entries))
        group = self._group_of(image)
        yield from (n for n in map(int, order) if n != image and self._group_of(n) == group)


@contextmanager
def random_streams(seed: int, *key: int) -> Iterator[None]:
    """Within the context, let random, numpy and torch on the CPU draw from streams of this key."""
    sequence = np.random.SeedSequence(_unsigned(seed), spawn_key=key)
    words = sequence.generate_state(8)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(words.tobytes())
    np.random.seed(words)
    # Not torch.manual_seed, which seeds devices too.
    torch.default_generator.manual_seed(int(words[0]))
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _unsigned(seed: int) -> int:
    return seed % 2**64
