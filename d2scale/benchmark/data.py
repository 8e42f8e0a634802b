"""Batches to measure with: the config's own datasets, or random images of a usual size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.common.config import CfgNode

from d2scale.coco.dataset import load_dataset, load_training_dataset
from d2scale.engine.data.chunks import Sample
from d2scale.engine.data.loader import build_test_loader, build_train_loader
from d2scale.engine.data.sampling import Draw
from d2scale.engine.data.transforms import ResizeAndFlip
from d2scale.errors import DataError

# COCO's commonest image, (height, width) in pixels, and its average number of boxes.
_USUAL_IMAGE = (480, 640)
_USUAL_BOXES = 7
# Different batches: with one alone every size would be in the caches.
_RANDOM_BATCHES = 8


@dataclass(frozen=True)
class Source:
    """Where batches come from.

    Attributes:
        description: for the report.
        ims_per_batch: images in a batch.
        open: gives endless batches, and ends what makes them.
    """

    description: str
    ims_per_batch: int
    open: Callable[[], AbstractContextManager[Iterator[list[Sample]]]]


def find_source(cfg: CfgNode, data: str, *, training: bool, ims_per_batch: int = 1) -> Source:
    """Return batches of the config's training or first test dataset, or random ones.

    Args:
        cfg: its ``DATASETS``, ``INPUT``, ``DATALOADER`` and ``MODEL``.
        data: "real", "random", or "auto" for real where the dataset is on this machine.
        training: draw the training augmentation and add boxes.
        ims_per_batch: images in a batch.

    Raises:
        DataError: for "real", if the dataset is not there or is broken.
    """
    if data != "random":
        try:
            return _real(cfg, training, ims_per_batch)
        except DataError:
            if data == "real":
                raise
    augmentation = ResizeAndFlip.for_training(cfg) if training else ResizeAndFlip.for_testing(cfg)
    batches = [
        [_random_sample(augmentation, number * ims_per_batch + i) for i in range(ims_per_batch)]
        for number in range(_RANDOM_BATCHES)
    ]
    height, width = _USUAL_IMAGE
    description = f"random images of {width}x{height}, resized as INPUT says"

    @contextmanager
    def cycle() -> Iterator[Iterator[list[Sample]]]:
        yield itertools.cycle(batches)

    return Source(description, ims_per_batch, cycle)


def _real(cfg: CfgNode, training: bool, ims_per_batch: int) -> Source:
    if training:
        dataset = load_training_dataset(cfg)

        def open_training() -> AbstractContextManager[Any]:
            return build_train_loader(
                cfg,
                dataset,
                world_size=1,
                rank=0,
                ims_per_batch=ims_per_batch,
                seed=max(cfg.SEED, 0),
                exact=cfg.D2SCALE.EXACT,
            )

        return Source(dataset.name, ims_per_batch, open_training)
    names = tuple(cfg.DATASETS.TEST)
    tested = load_dataset(names[0] if names else "", key="DATASETS.TEST")

    @contextmanager
    def open_test() -> Iterator[Iterator[list[Sample]]]:
        loader = build_test_loader(cfg, tested, world_size=1, rank=0)
        yield (batch for _ in itertools.count() for batch in loader)

    return Source(tested.name, 1, open_test)


def _random_sample(augmentation: ResizeAndFlip, number: int) -> Sample:
    draw = torch.Generator().manual_seed(number)
    original = _USUAL_IMAGE
    height, width, _ = augmentation.draw(0, Draw(number, 0), *original)
    corner, side = torch.rand(2, _USUAL_BOXES, 2, generator=draw)
    side = (side * 0.4 + 0.05).minimum(1 - corner)
    scale = torch.tensor([width, height] * 2, dtype=torch.float32)
    return {
        "image": torch.randint(256, (3, height, width), dtype=torch.uint8, generator=draw),
        "height": original[0],
        "width": original[1],
        "image_id": number,
        "file_name": "",
        "boxes": torch.cat([corner, corner + side], dim=1) * scale,
        "classes": torch.zeros(_USUAL_BOXES, dtype=torch.int64),
    }
