"""The largest batches that a training can meet, from the sizes of its images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from d2scale.coco.sizes import aspect_ratio_groups, output_size

Size = tuple[int, int]

# COCO's most crowded training image has 93 boxes.
ASSUMED_BOXES = 100
# (height, width): nearly square ones reach the short edge, elongated ones the longest.
_ASSUMED_IMAGES = ((9, 10), (1, 9), (10, 9), (9, 1))


@dataclass(frozen=True)
class WorstCase:
    """The most that a batch can hold."""

    # (height, width) in pixels that a batch is padded to, before it is rounded up to the model's
    # multiple; one for each group of images that batches are made of, the largest area first.
    sizes: tuple[Size, ...]
    boxes: int  # the most that one image has
    origin: str  # the images that it was computed from, in words

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
        sample = {
            "image": torch.zeros((3, height, width), dtype=torch.uint8),
            "height": height,
            "width": width,
            "file_name": "",
            "boxes": _spread_boxes(self.boxes, height, width),
            "classes": torch.zeros(self.boxes, dtype=torch.int64),
        }
        return [{**sample, "image_id": index} for index in range(count)]

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


def assumed_worst_case(short_edges: Sequence[int], max_size: int, *, grouped: bool) -> WorstCase:
    """Return the worst case of any dataset: any aspect ratio, and as many boxes as COCO has.

    Args:
        short_edges, max_size, grouped: see :func:`largest_sizes`; without 0, for nothing bounds
            images that keep their own size.
    """
    heights, widths = zip(*_ASSUMED_IMAGES, strict=True)
    sizes = largest_sizes(heights, widths, short_edges, max_size, grouped=grouped)
    return WorstCase(sizes, ASSUMED_BOXES, "images of any aspect ratio")


def largest_sizes(
    heights: Sequence[int],
    widths: Sequence[int],
    short_edges: Sequence[int],
    max_size: int,
    *,
    grouped: bool,
) -> tuple[Size, ...]:
    """Return the largest padded sizes of batches of resized images, the largest area first.

    Args:
        heights, widths: of the images, in pixels.
        short_edges: lengths that the shorter edge of an image is resized to; 0: not resized.
        max_size: longest that the longer edge becomes.
        grouped: whether a batch holds only wide or only high images; there is one size for each.
    """
    groups = [0] * len(heights)
    if grouped:
        groups = aspect_ratio_groups(np.array(widths), np.array(heights)).tolist()
    largest: dict[int, Size] = {}
    for group, height, width in set(zip(groups, heights, widths, strict=True)):
        for short_edge in short_edges:
            size = output_size(height, width, short_edge, max_size)
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
    limits = (width, height, width, height)
    return torch.stack([c.clamp(0, most) for c, most in zip(corners, limits, strict=True)], dim=1)
