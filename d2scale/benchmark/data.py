"""Batches to time: from the config's own datasets, or random images of a usual size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from fvcore.common.config import CfgNode

from d2scale.coco.dataset import CocoDataset, load_dataset, load_training_dataset
from d2scale.engine.data.chunks import Sample
from d2scale.engine.data.loader import build_test_loader, build_train_loader
from d2scale.engine.data.sampling import Draw
from d2scale.engine.data.transforms import ResizeAndFlip
from d2scale.errors import DataError

# COCO's commonest image, (height, width) in pixels, and its average number of boxes.
_USUAL_IMAGE = (480, 640)
_USUAL_BOXES = 7
# Different batches: a single one would be in the processor's caches.
_RANDOM_BATCHES = 8


class Batches(NamedTuple):
    """Endless batches, and where they come from, in words."""

    source: str
    batches: Iterator[list[Sample]]


@contextmanager
def open_batches(
    cfg: CfgNode, data: str, *, training: bool, ims_per_batch: int = 1
) -> Iterator[Batches]:
    """Within the context, give batches of the training or first test dataset, or random ones.

    ``data`` is "real" (DataError if the dataset is missing or broken), "random", or "auto" for real
    if it can be. A training batch has ``ims_per_batch`` augmented images with boxes, a test batch
    one image.
    """
    dataset = None if data == "random" else _find_dataset(cfg, training, required=data == "real")
    if dataset is None:
        height, width = _USUAL_IMAGE
        source = f"random images of {width}x{height}, resized as INPUT says"
        yield Batches(source, itertools.cycle(_random_batches(cfg, training, ims_per_batch)))
    elif training:
        seed, exact = max(cfg.SEED, 0), cfg.D2SCALE.EXACT
        with build_train_loader(
            cfg, dataset, world_size=1, rank=0, ims_per_batch=ims_per_batch, seed=seed, exact=exact
        ) as loader:
            yield Batches(dataset.name, loader)
    else:
        tests = build_test_loader(cfg, dataset, world_size=1, rank=0)
        yield Batches(dataset.name, (batch for _ in itertools.count() for batch in tests))


def _find_dataset(cfg: CfgNode, training: bool, *, required: bool) -> CocoDataset | None:
    try:
        if training:
            return load_training_dataset(cfg)
        names = tuple(cfg.DATASETS.TEST)
        return load_dataset(names[0] if names else "", key="DATASETS.TEST", cfg=cfg)
    except DataError:
        if required:
            raise
        return None


def _random_batches(cfg: CfgNode, training: bool, ims_per_batch: int) -> list[list[Sample]]:
    augmentation = ResizeAndFlip.for_training(cfg) if training else ResizeAndFlip.for_testing(cfg)
    return [
        [_random_sample(augmentation, number * ims_per_batch + i) for i in range(ims_per_batch)]
        for number in range(_RANDOM_BATCHES)
    ]


def _random_sample(augmentation: ResizeAndFlip, number: int) -> Sample:
    generator = torch.Generator().manual_seed(number)
    height, width, _ = augmentation.draw(0, Draw(number, 0), *_USUAL_IMAGE)
    corner, side = torch.rand(2, _USUAL_BOXES, 2, generator=generator)
    side = (side * 0.4 + 0.05).minimum(1 - corner)
    scale = torch.tensor([width, height] * 2, dtype=torch.float32)
    return {
        "image": torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator),
        "height": _USUAL_IMAGE[0],
        "width": _USUAL_IMAGE[1],
        "image_id": number,
        "file_name": "",
        "boxes": torch.cat([corner, corner + side], dim=1) * scale,
        "classes": torch.zeros(_USUAL_BOXES, dtype=torch.int64),
    }
