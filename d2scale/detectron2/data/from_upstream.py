"""Taking a training loader apart that a user, detectron2 or d2go has built."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset, ToIterableDataset
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from d2scale.detectron2.data.private_upstream import follows_shared_stream, unmapped

# Settings of a DataLoader that do not say what it loads.
_OPTIONS = ("num_workers", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")


class ForeignLoaderError(Exception):
    """Why a loader cannot be taken apart."""


@dataclass(frozen=True)
class LoaderParts:
    """What a training loader consists of."""

    entries: Any  # of the dataset, by number, before they are mapped
    mapper: Callable[[Any], Any]
    sampler: Any  # with a stream that all processes share
    grouped: bool  # by aspect ratio
    collate: Callable[[list[Any]], Any] | None  # of a batch; None: it stays a list
    # Shows a step's samples to what the loader was wrapped in, and returns what comes out.
    pass_on: Callable[[list[Any]], list[Any]]
    options: dict[str, Any] = field(default_factory=dict)  # of a DataLoader


def take_apart(loader: Any) -> LoaderParts:
    """Return the parts of a loader.

    It may be what detectron2's ``build_detection_train_loader`` or ``build_batch_data_loader``
    returns, or torch's DataLoader over a map-style dataset, with a sampler of detectron2's kind.

    d2go wraps it into an object that draws some of the samples. Raises ForeignLoaderError for
    another.
    """
    loader, pass_on = _unwrapped(loader)
    loader, collate = unmapped(loader)
    grouped = type(loader) is AspectRatioGroupedDataset
    if grouped:
        loader = loader.dataset
    if type(loader) is not DataLoader:
        raise ForeignLoaderError(f"it is a {type(loader).__name__}")
    if type(loader.batch_sampler) is not BatchSampler:
        raise ForeignLoaderError("it batches by a batch_sampler of its own")
    if not grouped and loader.collate_fn is not trivial_batch_collator:
        collate = loader.collate_fn
    dataset, sampler = _dataset_and_sampler(loader)
    entries, mapper = unmapped(dataset)
    if grouped:
        _check_sizes(entries, mapper)
    options = {name: getattr(loader, name) for name in _OPTIONS}
    if loader.num_workers:
        options["prefetch_factor"] = loader.prefetch_factor
    mapper = mapper or _unchanged
    return LoaderParts(entries, mapper, sampler, grouped, collate, pass_on, options)


def _unwrapped(loader: Any) -> tuple[Any, Callable[[Any], Any]]:
    if isinstance(loader, (DataLoader, IterableDataset)) or not hasattr(loader, "data_loader"):
        return loader, _unchanged
    wrapper = copy.copy(loader)

    def pass_on(samples: list[Any]) -> Any:
        wrapper.data_loader = [samples]
        return next(iter(wrapper))

    return loader.data_loader, pass_on


def _dataset_and_sampler(loader: DataLoader[Any]) -> tuple[Any, Any]:
    dataset: Any = loader.dataset
    sampler = loader.sampler
    if type(dataset) is ToIterableDataset and dataset.shard_sampler:
        dataset, sampler = dataset.dataset, dataset.sampler
    if isinstance(dataset, IterableDataset):
        raise ForeignLoaderError("its dataset is iterable, without numbers for its images")
    if not follows_shared_stream(sampler):
        name = type(sampler).__name__
        raise ForeignLoaderError(f"its {name} has no stream that all processes share")
    return dataset, sampler


def _check_sizes(entries: Any, mapper: Any) -> None:
    if mapper is None:
        raise ForeignLoaderError("it groups by aspect ratio what was mapped before")
    if not {"width", "height"} <= set(entries[0]):
        raise ForeignLoaderError("the entries of its dataset have no width and height")


def _unchanged(value: Any) -> Any:
    return value
