"""Private parts of detectron2's datasets and samplers, in one place.

``tests/detectron2/data/test_private_upstream.py`` names the versions that they were tried with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from detectron2.data.common import MapDataset, _MapIterableDataset
from detectron2.utils import comm

# What a sampler that was given no seed draws for itself.
_DRAWN = ("_seed", "_seed_subset", "_indexes_subset")


def unmapped(dataset: Any) -> tuple[Any, Callable[[Any], Any] | None]:
    """Return the dataset below a MapDataset, and its function; None if it is no MapDataset."""
    if isinstance(dataset, (MapDataset, _MapIterableDataset)):
        return dataset._dataset, dataset._map_func
    return dataset, None


def replace_function(
    dataset: Any, replacement: Callable[[Callable[[Any], Any]], Callable[[Any], Any]]
) -> None:
    """Replace the function of a MapDataset by what ``replacement`` makes of it, in place."""
    if isinstance(dataset, MapDataset):
        dataset._map_func = replacement(dataset._map_func)


def shared_stream(sampler: Any) -> Iterator[int]:
    """Return the endless stream that the samplers of all processes share.

    Raises AttributeError if a sampler has none.
    """
    stream: Iterator[int] = sampler._infinite_indices()
    return stream


def follows_shared_stream(sampler: Any) -> bool:
    """Return whether a sampler takes every N-th element of a shared stream, as detectron2's do."""
    if not hasattr(sampler, "_infinite_indices"):
        return False
    rank = getattr(sampler, "_rank", comm.get_rank())
    world_size = getattr(sampler, "_world_size", comm.get_world_size())
    own = islice(shared_stream(sampler), rank, None, world_size)
    return list(islice(own, 3)) == list(islice(sampler, 3))


def drawn_by(sampler: Any) -> dict[str, Any]:
    """Return what decides the order of a sampler's stream: seeds, and the subset if it has one."""
    return {name: vars(sampler)[name] for name in _DRAWN if name in vars(sampler)}


def with_drawn(sampler: Any, drawn: Mapping[str, Any]) -> Any:
    """Return a copy of a sampler with another's :func:`drawn_by`."""
    sampler = copy.copy(sampler)
    vars(sampler).update(drawn)
    return sampler


def seed_of(sampler: Any) -> int:
    """Return the seed of a sampler's stream, 0 if it has none."""
    return getattr(sampler, "_seed", None) or 0
