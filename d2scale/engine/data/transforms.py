"""Draw the resizing and flipping of an image before it is read.

What is done to an image is a function of (seed, epoch, image) alone, so the size that every
image of a step will have is known without opening a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from fvcore.common.config import CfgNode

from d2scale.coco.sizes import output_size
from d2scale.config.value_rules import LONGEST_EDGE, Rule, judge, one_of, whole
from d2scale.engine.data.sampling import Draw, uniform_numbers
from d2scale.errors import ConfigError, Fault
from d2scale.planning.hardware import SHORT_EDGES

# Boxes thinner than this after resizing are left out, as in detectron2.
_THINNEST_BOX = 1e-5


class Augmentation(NamedTuple):
    """What is done to one image: its new size in pixels, and whether it is mirrored."""

    height: int
    width: int
    flip: bool


@dataclass(frozen=True)
class ResizeAndFlip:
    """detectron2's usual augmentation: resize the shortest edge, then mirror half of the images."""

    # Lengths in pixels to choose from, or with "range" the smallest and the largest; 0 leaves
    # the size alone.
    short_edges: tuple[int, ...]
    sampling: str  # "choice" or "range"
    max_size: int  # longest edge in pixels; it wins over the short edge
    flip: bool  # mirror images, each with a probability of one half
    # Images with a longer edge, in pixels, keep their size, to be cut in tiles later; 0: none.
    keep_above: int = 0

    @classmethod
    def for_training(cls, cfg: CfgNode) -> ResizeAndFlip:
        """Read the ``INPUT`` keys for training; ConfigError for :func:`input_faults`."""
        _raise_faults(cfg)
        inputs = cfg.INPUT
        return cls(
            tuple(inputs.MIN_SIZE_TRAIN),
            inputs.MIN_SIZE_TRAIN_SAMPLING,
            inputs.MAX_SIZE_TRAIN,
            inputs.RANDOM_FLIP == "horizontal",
        )

    @classmethod
    def for_testing(cls, cfg: CfgNode) -> ResizeAndFlip:
        """Read the ``INPUT`` keys for evaluation: one size, no mirroring; ConfigError as above."""
        _raise_faults(cfg)
        return cls((cfg.INPUT.MIN_SIZE_TEST,), "choice", cfg.INPUT.MAX_SIZE_TEST, False)

    def draw(self, seed: int, draw: Draw, height: int, width: int) -> Augmentation:
        """Draw the augmentation of an image of ``height`` times ``width`` pixels."""
        if 0 < self.keep_above < max(height, width):
            return Augmentation(height, width, False)
        for_size, for_flip = uniform_numbers(seed, draw.epoch, draw.image, 2).tolist()
        if self.sampling == "range":
            low, high = self.short_edges
            short_edge = low + int(for_size * (high - low + 1))
        else:
            short_edge = self.short_edges[int(for_size * len(self.short_edges))]
        new_height, new_width = output_size(height, width, short_edge, self.max_size)
        return Augmentation(new_height, new_width, self.flip and for_flip < 0.5)


def transform_boxes(
    boxes: np.ndarray, height: int, width: int, augmentation: Augmentation
) -> tuple[np.ndarray, np.ndarray]:
    """Move boxes along with their image, which has ``height`` times ``width`` pixels.

    Args:
        boxes: x0 y0 x1 y1 in pixels of the original image, shape (n, 4).

    Returns:
        boxes: in pixels of the new image and within it, shape (k, 4), float32.
        kept: which of the n boxes still have a size, shape (n,), bool.
    """
    new_height, new_width, flip = augmentation
    scale = (new_width / width, new_height / height)
    moved = boxes.astype(np.float64) * np.array(scale * 2)
    if flip:
        moved[:, [0, 2]] = new_width - moved[:, [2, 0]]
    moved = np.clip(moved, 0, np.array((new_width, new_height) * 2)).astype(np.float32)
    kept = ((moved[:, 2:] - moved[:, :2]) > _THINNEST_BOX).all(axis=1)
    return moved[kept], kept


def _raise_faults(cfg: CfgNode) -> None:
    if faults := input_faults(cfg):
        raise ConfigError(faults)


_RULES = (
    one_of("INPUT.FORMAT", ("BGR", "RGB")),
    one_of("INPUT.RANDOM_FLIP", ("horizontal", "none")),
    one_of("INPUT.MIN_SIZE_TRAIN_SAMPLING", ("choice", "range")),
    SHORT_EDGES,
    whole("INPUT.MIN_SIZE_TEST", 0, LONGEST_EDGE),
    whole("INPUT.MAX_SIZE_TRAIN", 1),
    whole("INPUT.MAX_SIZE_TEST", 1),
)
_RANGE = Rule(
    SHORT_EDGES.key,
    "(smallest, largest)",
    lambda edges: len(edges) == 2 and edges[0] <= edges[1],
    "correct it, or set INPUT.MIN_SIZE_TRAIN_SAMPLING to choice",
)


def input_faults(cfg: CfgNode) -> list[Fault]:
    """Return the values of ``INPUT`` that the loaders cannot serve."""
    faults = judge(cfg, _RULES)
    edges_fit = not SHORT_EDGES.faults(cfg.INPUT.MIN_SIZE_TRAIN)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and edges_fit:
        faults += judge(cfg, (_RANGE,))
    return faults
