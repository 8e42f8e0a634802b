"""A dataset of detectron2, mappers, and loaders as the processes of a cluster build them."""

from __future__ import annotations

import random
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch

IMAGES = 37


def entries():
    """Dataset entries of all kinds of sizes, without image files."""
    sizes = np.random.RandomState(0).randint(40, 80, (IMAGES, 2)).tolist()
    return [
        {"image_id": number, "width": width, "height": height, "annotations": [{"category_id": 0}]}
        for number, (width, height) in enumerate(sizes)
    ]


def plain_mapper(entry):
    return {**entry, "image": torch.tensor([entry["image_id"]])}


def random_mapper(entry):
    """Draws from all that augmentations draw from."""
    return {**entry, "image": torch.rand(3), "python": random.random(), "numpy": np.random.rand()}


def refusing_mapper(entry):
    """Refuses every third image."""
    return None if entry["image_id"] % 3 == 0 else random_mapper(entry)


def refusing_all(entry):
    return None


@contextmanager
def process(rank, world_size):
    """Within the context, be one process of a cluster to detectron2's samplers and loaders."""
    import detectron2.data.build  # noqa: F401, it takes the function over when it is imported

    with (
        mock.patch("detectron2.utils.comm.get_rank", return_value=rank),
        mock.patch("detectron2.utils.comm.get_world_size", return_value=world_size),
        mock.patch("detectron2.data.build.get_world_size", return_value=world_size),
    ):
        yield


def numbers(samples):
    return [sample["image_id"] for sample in samples]


def same(first, second):
    """Return whether two lists of samples hold the same values."""
    return all(
        torch.equal(a["image"], b["image"]) and {**a, "image": None} == {**b, "image": None}
        for a, b in zip(first, second, strict=True)
    )
