"""Assigning ground-truth boxes to the locations of the pyramid (FCOS, arXiv 1904.01355, 3.1).

All shapes follow from the image size and the number of boxes alone, so the same code runs on
fake tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

BACKGROUND = -1


class Locations(NamedTuple):
    """The locations of all levels, level after level, each row by row."""

    x: Tensor  # (l,), pixels of the padded image
    y: Tensor  # (l,), likewise
    stride: Tensor  # (l,), pixels between neighbours on the location's level


class Targets(NamedTuple):
    """What the head should predict at every location of n images."""

    labels: Tensor  # (n, l), int64: the class, or -1 for background
    # (n, 4, l): to the left, top, right and bottom side of the location's box, in strides of its
    # level; 1 at background.
    distances: Tensor
    centerness: Tensor  # (n, l), in [0, 1]; 0 at background

    @property
    def positive(self) -> Tensor:
        """(n, l), bool."""
        return self.labels != BACKGROUND

    def sums(self) -> dict[str, Tensor]:
        """Return the loss normalizers, float64 scalars: positives and their summed centre-ness."""
        return {
            "num_positives": self.positive.sum(dtype=torch.float64),
            "centerness_sum": self.centerness.sum(dtype=torch.float64),
        }


def level_shapes(size: tuple[int, int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """Return height and width of every level for a padded image of ``size`` (height, width)."""
    return [(math.ceil(size[0] / stride), math.ceil(size[1] / stride)) for stride in strides]


def locate(
    shapes: Sequence[tuple[int, int]],
    strides: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Locations:
    """Return the locations of levels of these shapes: s * (column + 1/2, row + 1/2)."""
    columns, rows = [], []
    for (height, width), stride in zip(shapes, strides, strict=True):
        x = torch.arange(width, dtype=dtype, device=device) * stride + stride / 2
        y = torch.arange(height, dtype=dtype, device=device) * stride + stride / 2
        columns.append(x.repeat(height))
        rows.append(y.repeat_interleave(width))
    x, y = torch.cat(columns), torch.cat(rows)
    return Locations(x, y, _per_location(strides, shapes, x))


def _per_location(
    values: Sequence[float], shapes: Sequence[tuple[int, int]], like: Tensor
) -> Tensor:
    """Return one value a level, repeated for each of its locations: (l,)."""
    levels = zip(values, shapes, strict=True)
    return torch.cat([like.new_full((height * width,), value) for value, (height, width) in levels])


@dataclass(frozen=True)
class TargetRule:
    """How boxes are assigned to locations; :mod:`meta_fcos.config` describes the settings."""

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    sizes_of_interest: tuple[float, ...] = (64, 128, 256, 512)
    center_sample: bool = True
    radius: float = 1.5

    def __post_init__(self) -> None:
        if len(self.sizes_of_interest) != len(self.strides) - 1:
            raise ValueError(
                f"{len(self.sizes_of_interest)} sizes of interest for {len(self.strides)} levels; "
                "expected one fewer than levels"
            )

    def assign(
        self,
        boxes: Sequence[Tensor],
        classes: Sequence[Tensor],
        shapes: Sequence[tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> Targets:
        """Return the targets of n images, float32 or float64, on levels of these shapes.

        Of each image there are boxes (k, 4), x0 y0 x1 y1 in pixels of the padded image, and
        classes (k,), int64. They are worked on together, on ``device`` or else where they are.
        """
        device = device or boxes[0].device
        # Filled up with boxes of size 0, in which no location lies.
        corners = _stacked(boxes).to(device, non_blocking=True).to(dtype)
        numbers = _stacked(classes).to(device, non_blocking=True)
        locations = locate(shapes, self.strides, dtype=dtype, device=device)
        x0, y0, x1, y1 = corners.unbind(dim=2)
        area = (x1 - x0) * (y1 - y0)
        # Of several candidates the smallest wins; infinite means that there is none.
        candidates = self._candidates(corners, locations, shapes)
        smallest, index = torch.where(candidates, area[:, :, None], math.inf).min(dim=1)
        positive = smallest < math.inf
        x, y, stride = locations
        x0, y0, x1, y1 = corners.gather(1, index[:, :, None].expand(-1, -1, 4)).unbind(dim=2)
        distances = torch.stack((x - x0, y - y0, x1 - x, y1 - y), dim=1) / stride
        distances = torch.where(positive[:, None], distances, 1)
        labels = torch.where(positive, numbers.gather(1, index), BACKGROUND)
        return Targets(labels, distances, centerness(distances) * positive)

    def _candidates(
        self, boxes: Tensor, locations: Locations, shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Return whether a location may predict a box, boxes (n, k, 4): (n, k, l), bool."""
        x, y, stride = locations
        lower = _per_location((-1, *self.sizes_of_interest), shapes, x)
        upper = _per_location((*self.sizes_of_interest, math.inf), shapes, x)
        x0, y0, x1, y1 = boxes[..., None].unbind(dim=2)
        farthest = torch.maximum(torch.maximum(x - x0, x1 - x), torch.maximum(y - y0, y1 - y))
        fits = (farthest >= lower) & (farthest <= upper)
        if self.center_sample:
            center_x, center_y, reach = (x0 + x1) / 2, (y0 + y1) / 2, self.radius * stride
            x0, x1 = torch.maximum(x0, center_x - reach), torch.minimum(x1, center_x + reach)
            y0, y1 = torch.maximum(y0, center_y - reach), torch.minimum(y1, center_y + reach)
        return fits & (x > x0) & (x < x1) & (y > y0) & (y < y1)


def _stacked(images: Sequence[Tensor]) -> Tensor:
    """Stack tensors of different lengths, filled up with zeros to the longest, of 1 at least."""
    stacked = nn.utils.rnn.pad_sequence(list(images), batch_first=True)
    return stacked if stacked.shape[1] else stacked.new_zeros((len(images), 1, *stacked.shape[2:]))


def centerness(distances: Tensor) -> Tensor:
    """Return the centre-ness (FCOS, equation 3) of distances (n, 4, l) above 0: (n, l), (0, 1]."""
    left, top, right, bottom = distances.unbind(dim=1)
    horizontal = torch.minimum(left, right) / torch.maximum(left, right)
    vertical = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (horizontal * vertical).sqrt_()
