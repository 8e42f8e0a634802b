"""Digests of datasets: by them ranks compare the data that they were given."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from d2scale.coco.records import CocoDataset


class DataFacts(NamedTuple):
    """What a run knows of its datasets before it starts its ranks."""

    images: int = 0  # to train on; 0 if the run does not train
    digests: dict[str, str] = {}  # of all datasets, by what they describe  # noqa: RUF012


def data_facts(trained: CocoDataset | None, tested: Iterable[CocoDataset]) -> DataFacts:
    """Return how many images a run trains on, and the digests of all its datasets."""
    datasets = [*([trained] if trained else []), *tested]
    digests = dict(pair for dataset in datasets for pair in _digests(dataset))
    return DataFacts(len(trained) if trained else 0, digests)


def _digests(dataset: CocoDataset) -> Iterator[tuple[str, str]]:
    """Yield what a dataset holds, by kind, as counts and digests.

    Of what was read, not of the file: it may be written otherwise, or lie elsewhere, on another
    machine. 0.1 s for the 118 000 images of train2017.
    """
    records = dataset.records
    # Without their folders, which may differ.
    names = b"\0".join(name.rpartition(b"/")[2] for name in records.file_names.tolist())
    images = (records.image_ids, records.heights, records.widths, names)
    boxes = (records.box_starts, records.boxes, records.classes)
    classes = "\0".join(dataset.class_names).encode()
    for kind, count, parts in (
        ("images", len(records), images),
        ("boxes", len(records.boxes), boxes),
        ("classes", len(dataset.class_names), (classes,)),
    ):
        yield f"{kind} of {dataset.name}", f"{count} (digest {_digest(parts)})"


def _digest(parts: Iterable[np.ndarray | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return digest.hexdigest()[:16]
