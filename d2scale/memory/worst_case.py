"""The largest batches that a training can meet, from its config and, if at hand, its dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from d2scale.coco.records import Records
from d2scale.coco.sizes import aspect_ratio_groups, output_size
from d2scale.errors import ConfigError, DataError, Fault

Size = tuple[int, int]

# COCO's most crowded training image has 93 boxes.
ASSUMED_BOXES = 100
# (height, width): nearly square ones reach the short edge, elongated ones the longest.
_ASSUMED_IMAGES = ((9, 10), (1, 9), (10, 9), (9, 1))


@dataclass(frozen=True)
class WorstCase:
    """What a batch may hold at most.

    Attributes:
        sizes: (height, width) in pixels that a batch is padded to, before it is rounded up to
            the model's multiple; one for each group of images that batches are made of, the
            largest area first.
        boxes: the most that one image has.
        origin: what it was found from, in words.
    """

    sizes: tuple[Size, ...]
    boxes: int
    origin: str

    @property
    def size(self) -> Size:
        """The size of the largest batch."""
        return self.sizes[0]

    def samples(self, count: int, size: Size | None = None) -> list[dict[str, Any]]:
        """Return a batch of ``count`` images of ``size``, each with the most boxes.

        The boxes are of many sizes, spread over the image; all have class 0. The images share
        their memory.
        """
        height, width = size or self.size
        image = torch.zeros((3, height, width), dtype=torch.uint8)
        boxes = _spread_boxes(self.boxes, height, width)
        classes = torch.zeros(self.boxes, dtype=torch.int64)
        return [
            {
                "image": image,
                "height": height,
                "width": width,
                "image_id": index,
                "file_name": "",
                "boxes": boxes,
                "classes": classes,
            }
            for index in range(count)
        ]

    @property
    def trial_sizes(self) -> tuple[Size, ...]:
        """Sizes for a few steps: each group's largest, a smaller one, the largest again.

        Steps of other sizes leave the allocator's cache in pieces that the largest must still
        find room in.
        """
        smaller = (round(0.8 * self.size[0]), round(0.8 * self.size[1]))
        return (*self.sizes, smaller, self.size)

    def trial_batches(self, count: int) -> list[list[dict[str, Any]]]:
        """Return a batch of ``count`` images of each of the ``trial_sizes``."""
        return [self.samples(count, size) for size in self.trial_sizes]


def assumed_worst_case(cfg: Any) -> WorstCase:
    """Return what bounds every dataset: any aspect ratio, and as many boxes as COCO has.

    Raises:
        ConfigError: if images keep their own size, for then nothing bounds them.
    """
    if 0 in cfg.INPUT.MIN_SIZE_TRAIN:
        raise ConfigError(
            [
                Fault(
                    "INPUT.MIN_SIZE_TRAIN",
                    tuple(cfg.INPUT.MIN_SIZE_TRAIN),
                    "without 0, which keeps the size of the images",
                    "give sizes in pixels, or use --device cuda, which looks at the dataset",
                )
            ]
        )
    shapes = _ASSUMED_IMAGES
    sizes = _largest_sizes(cfg, [h for h, _ in shapes], [w for _, w in shapes])
    return WorstCase(sizes, ASSUMED_BOXES, "images of any aspect ratio")


def worst_case_of(cfg: Any, records: Records, name: str = "") -> WorstCase:
    """Return what the augmentation can make of these images.

    Raises:
        DataError: if there are no images, or none has a box.
    """
    most_boxes = int(records.box_counts.max(initial=0))
    return worst_case_of_images(
        cfg, records.heights.tolist(), records.widths.tolist(), most_boxes, name
    )


def worst_case_of_images(
    cfg: Any, heights: Sequence[int], widths: Sequence[int], most_boxes: int, name: str = ""
) -> WorstCase:
    """Return what resizing by the shortest edge can make of images.

    Args:
        cfg: any engine's; its ``INPUT`` and ``DATALOADER`` are read.
        heights, widths: of the images, in pixels.
        most_boxes: that one of them has.
        name: of their dataset.

    Raises:
        DataError: if none has a box.
    """
    if most_boxes == 0:
        advice = "training would learn nothing: give a dataset with annotations"
        raise DataError([Fault("DATASETS.TRAIN", name, "images with boxes", advice)])
    sizes = _largest_sizes(cfg, heights, widths)
    return WorstCase(sizes, most_boxes, f"{len(heights)} images of {name}")


def _largest_sizes(cfg: Any, heights: Sequence[int], widths: Sequence[int]) -> tuple[Size, ...]:
    groups = [0] * len(heights)
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        groups = aspect_ratio_groups(np.array(widths), np.array(heights)).tolist()
    largest: dict[int, Size] = {}
    shapes = set(zip(groups, heights, widths, strict=True))
    for group, height, width in shapes:
        for short_edge in cfg.INPUT.MIN_SIZE_TRAIN:
            size = output_size(height, width, short_edge, cfg.INPUT.MAX_SIZE_TRAIN)
            # One image of a batch may be the highest and another the widest.
            before = largest.get(group, (0, 0))
            largest[group] = (max(before[0], size[0]), max(before[1], size[1]))
    return tuple(sorted(largest.values(), key=lambda size: (-size[0] * size[1], size)))


def _spread_boxes(count: int, height: int, width: int) -> torch.Tensor:
    """Boxes x0 y0 x1 y1 around points of a grid, from small to as large as the image."""
    across = max(1, round(count**0.5))
    index = torch.arange(count)
    x = (index % across + 0.5) / across * width
    y = (index // across + 0.5) / (-(-count // across)) * height
    half = torch.linspace(0.02, 0.5, count) if count > 1 else torch.full((count,), 0.25)
    corners = (x - half * width, y - half * height, x + half * width, y + half * height)
    limits: Iterable[int] = (width, height, width, height)
    clipped = [c.clamp(0, limit) for c, limit in zip(corners, limits, strict=True)]
    return torch.stack(clipped, dim=1)
