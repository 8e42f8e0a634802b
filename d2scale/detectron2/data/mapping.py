"""Samples made of dataset entries: whoever makes them, in whatever order, they are the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from d2scale.detectron2.data.from_upstream import LoaderParts
from d2scale.detectron2.data.readable import ReadableMapper
from d2scale.errors import D2ScaleError, DataError, Fault
from d2scale.step.random_stream import random_stream

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
        # Not all parts: where workers are spawned, as below d2go's launcher, this is pickled.
        self._entries = parts.entries
        self._mapper = ReadableMapper(parts.mapper)
        self._collate = parts.collate
        self._seed = seed
        self._group_of = group_of

    def __getitem__(self, request: Request) -> Any:
        """Return the samples, collated if the loader collates, or the error of the dataset."""
        try:
            samples = [self._sample(request, place) for place in range(len(request.images))]
        except D2ScaleError as error:
            # Raised, torch's loader would put its whole traceback into the message.
            return error
        if self._collate is None:
            return samples
        with random_stream(self._seed, request.step, request.virtual_rank, on_device=False):
            return self._collate(samples)

    def _sample(self, request: Request, place: int) -> Any:
        key = (request.step, request.virtual_rank, place)
        image = request.images[place]
        with random_stream(self._seed, *key, on_device=False):
            for tries, number in enumerate(chain([image], self._others(image, key)), start=1):
                sample = self._mapper(self._entries[number])
                if tries == _TRIES_BEFORE_WARNING and sample is None:
                    logger.warning("the mapper returned None for %d images in a row", tries)
                if sample is not None:
                    return sample
        advice = "look why the mapper refuses them"
        raise DataError([Fault("the mapper's sample", None, "one for some image", advice)])

    def _others(self, image: int, key: tuple[int, ...]) -> Iterator[int]:
        """Yield the other images of the group in an order of their own, for :meth:`_sample`."""
        sequence = np.random.SeedSequence(self._seed % 2**64, spawn_key=(*key, 1))
        order = np.random.Generator(np.random.PCG64(sequence)).permutation(len(self._entries))
        group = self._group_of(image)
        yield from (n for n in map(int, order) if n != image and self._group_of(n) == group)
