"""Detect on images much larger than those of the training, in tiles that overlap.

Resized as a whole, a large image shows its small objects in a few pixels. Its tiles are resized as
whole images are, so that objects have about the sizes that the model was trained with. What several
tiles show is merged by torchvision's NMS.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torchvision.ops import batched_nms

from d2scale.config.value_rules import Rule, is_whole, number
from d2scale.engine.data.images import resize_and_flip
from d2scale.engine.data.sampling import Draw
from d2scale.engine.data.transforms import ResizeAndFlip

logger = logging.getLogger(__name__)

_SIZE, _OVERLAP = "D2SCALE.TILES.SIZE", "D2SCALE.TILES.OVERLAP"
_SMALLEST = 32
TILE_RULES = (
    Rule(
        _SIZE,
        f"0 or a whole number of pixels from {_SMALLEST}",
        lambda size: is_whole(size) and (size == 0 or size >= _SMALLEST),
        "set it to 0 for whole images",
    ),
    number(_OVERLAP, least=0, most=0.9, advice="a share of a tile's edge, 0.2 say"),
)
# In one forward. The memory of a huge image is that of so many tiles.
_TILES_AT_ONCE = 4
# Overlap (IoU) above which the weaker of two boxes of a class is dropped: high, so that no box is
# lost that a tile alone would have shown.
_NMS_IOU = 0.6
# A box that ends within this share of a tile's edge from it is taken to be cut there.
_CUT_WITHIN = 0.02
# A cut box is dropped if a whole box of its class covers this share of it, and is not much less
# sure: the whole image of a huge picture shows phantoms where a model sees next to nothing.
_COVERED, _AS_SURE = 0.7, 0.5
_MOST_PAIRS = 2**18  # of boxes that are compared at once


class Box(NamedTuple):
    """A part of an image, in pixels; the ends are not in it."""

    x0: int
    y0: int
    x1: int
    y1: int


@dataclass(frozen=True)
class Tiling:
    """How large images are cut in tiles."""

    size: int  # edge of a tile in pixels of the original image; 0: none is cut
    overlap: float = 0.2  # of two neighbours, at least, as a share of the edge
    whole_image: bool = True  # also detect on the whole image, what no overlap can hold

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> Tiling:
        """Read ``D2SCALE.TILES``."""
        tiles = cfg.D2SCALE.TILES
        return cls(tiles.SIZE, tiles.OVERLAP, tiles.WHOLE_IMAGE)

    @property
    def overlap_pixels(self) -> int:
        """What two neighbours share at least: a smaller object is whole in one of them."""
        return int(self.size * self.overlap)

    def cuts(self, height: int, width: int) -> bool:
        """Return whether an image of this size is cut."""
        return 0 < self.size < max(height, width)

    def tiles(self, height: int, width: int) -> list[Box]:
        """Return the tiles of an image, row by row, all of one size and evenly spread."""
        high, wide = min(self.size, height), min(self.size, width)
        starts = product(self._starts(height), self._starts(width))
        return [Box(x, y, x + wide, y + high) for y, x in starts]

    def _starts(self, length: int) -> list[int]:
        rest = length - self.size
        if rest <= 0:
            return [0]
        steps = -(-rest // (self.size - self.overlap_pixels))
        return [rest * number // steps for number in range(steps + 1)]


class Found(NamedTuple):
    """What the views of one image show."""

    boxes: Tensor  # x0 y0 x1 y1 in pixels of the image, shape (n, 4)
    scores: Tensor  # shape (n,)
    classes: Tensor  # shape (n,), int64
    cut: Tensor  # whether a box ends where its tile ends inside the image, shape (n,), bool

    def take(self, kept: Tensor) -> Found:
        """Return the boxes with these numbers, or where ``kept`` is true."""
        return Found(*(column[kept] for column in self))


class TiledDetector(nn.Module):
    """A model that sees large images in tiles; every other image it sees as before.

    A sample of a large image holds its pixels as they are, not resized.
    """

    def __init__(
        self, model: nn.Module, tiling: Tiling, resizing: ResizeAndFlip, max_dets: int
    ) -> None:
        super().__init__()
        self.model = model
        self.tiling = tiling
        self.resizing = resizing  # of tiles, and of the whole image
        self.max_dets = max_dets  # of an image, whatever the number of its tiles

    def forward(self, samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Tensor]]:
        """Return boxes in pixels of the original image, scores and classes for each sample."""
        return [self._detect(sample) for sample in samples]

    def _detect(self, sample: Mapping[str, Any]) -> Mapping[str, Tensor]:
        if not self.tiling.cuts(sample["height"], sample["width"]):
            (output,) = self.model([sample])
            return output
        boxes, scores, classes, _ = self.merge(self.find(sample))
        return {"boxes": boxes, "scores": scores, "classes": classes}

    def find(self, sample: Mapping[str, Any]) -> Found:
        """Return what all views of a large image show."""
        height, width = sample["height"], sample["width"]
        tiles = self.tiling.tiles(height, width)
        found = [*self._find_in_tiles(sample, tiles)]
        if self.tiling.whole_image:
            whole = Box(0, 0, width, height)
            (output,) = self.model([self._view(sample, whole)])
            shown = _found(output, whole, (height, width), 0)
            sides = shown.boxes[:, 2:] - shown.boxes[:, :2]
            # A tile shows anything smaller, and better.
            found.append(shown.take(sides.amax(dim=1) > self.tiling.overlap_pixels))
        return Found(*(torch.cat(columns) for columns in zip(*found, strict=True)))

    def merge(self, found: Found) -> Found:
        """Return each object once, the best first: cut boxes give way to whole ones, then NMS."""
        return suppress(found.take(~covered_pieces(found)), self.max_dets)

    def _find_in_tiles(self, sample: Mapping[str, Any], tiles: Sequence[Box]) -> Iterable[Found]:
        size = sample["height"], sample["width"]
        margin = _CUT_WITHIN * self.tiling.size
        for start in range(0, len(tiles), _TILES_AT_ONCE):
            batch = tiles[start : start + _TILES_AT_ONCE]
            outputs = self.model([self._view(sample, tile) for tile in batch])
            for tile, output in zip(batch, outputs, strict=True):
                yield _found(output, tile, size, margin)

    def _view(self, sample: Mapping[str, Any], part: Box) -> dict[str, Any]:
        """Return a part of an image as a sample, resized as if it were an image."""
        height, width = part.y1 - part.y0, part.x1 - part.x0
        resizing = self.resizing.draw(0, Draw(0, 0), height, width)
        pixels = sample["image"][:, part.y0 : part.y1, part.x0 : part.x1]
        # The channels have the model's order already.
        image = resize_and_flip(pixels, resizing, "RGB")
        return {**sample, "image": image, "height": height, "width": width}


def with_tiles(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Return the detector of a config's evaluation: the model itself if ``TILES.SIZE`` is 0."""
    tiling, resizing = Tiling.from_cfg(cfg), ResizeAndFlip.for_testing(cfg)
    if not tiling.size:
        return model
    logger.info(
        "images larger than %d pixels are seen in tiles of that size, overlapping by %d pixels%s",
        *(tiling.size, tiling.overlap_pixels, ", and as a whole" if tiling.whole_image else ""),
    )
    return TiledDetector(model, tiling, resizing, cfg.TEST.DETECTIONS_PER_IMAGE)


def _found(
    output: Mapping[str, Tensor], tile: Box, image_size: tuple[int, int], margin: float
) -> Found:
    """Move a tile's boxes to their place in the image, and mark those cut at an inner edge."""
    boxes = output["boxes"] + output["boxes"].new_tensor((tile.x0, tile.y0) * 2)
    height, width = image_size
    cut = torch.zeros_like(output["scores"], dtype=torch.bool)
    for side, (edge, end) in enumerate(zip(tile, (0, 0, width, height), strict=True)):
        if edge != end:
            cut |= (boxes[:, side] - edge).abs() <= margin
    return Found(boxes, output["scores"], output["classes"], cut)


def covered_pieces(found: Found) -> Tensor:
    """Return which boxes are cut and lie in a whole box that is worth more, shape (n,), bool."""
    covered = torch.zeros_like(found.cut)
    # Class by class: of all pairs, few are of one class.
    for label in found.classes[found.cut].unique():
        of_class = found.classes == label
        whole = found.take(of_class & ~found.cut)
        pieces = (of_class & found.cut).nonzero()[:, 0]
        # A huge image has many of both.
        for some in pieces.split(max(1, _MOST_PAIRS // max(1, len(whole.scores)))):
            piece = found.take(some)
            sure = whole.scores >= _AS_SURE * piece.scores[:, None]
            within = _shares_within(piece.boxes, whole.boxes) >= _COVERED
            covered[some] = (within & sure).any(dim=1)
    return covered


def _shares_within(pieces: Tensor, boxes: Tensor) -> Tensor:
    """Return the share of each piece's area that lies in each box, shape (pieces, boxes)."""
    low = torch.maximum(pieces[:, None, :2], boxes[:, :2])
    high = torch.minimum(pieces[:, None, 2:], boxes[:, 2:])
    areas = (pieces[:, 2:] - pieces[:, :2]).prod(dim=1)
    return (high - low).clamp(min=0).prod(dim=2) / areas[:, None]


def suppress(found: Found, max_dets: int) -> Found:
    """Return the best boxes of an image, of those that overlap in a class only the best."""
    kept = batched_nms(found.boxes.float(), found.scores.float(), found.classes, _NMS_IOU)
    return found.take(kept[:max_dets])
