"""How detectron2 resizes images and groups them by aspect ratio."""

from __future__ import annotations

import numpy as np


def output_size(height: int, width: int, short_edge: int, max_size: int) -> tuple[int, int]:
    """Return the (height, width) of a resized image, with detectron2's arithmetic.

    Its shorter edge becomes ``short_edge`` unless the longer one would exceed ``max_size``, pixels;
    a ``short_edge`` of 0 leaves the image as it is.
    """
    if short_edge == 0:
        return height, width
    scale = short_edge / min(height, width)
    # The shorter edge is set, not multiplied: a product could round to one pixel less.
    if height < width:
        new_height, new_width = float(short_edge), scale * width
    else:
        new_height, new_width = scale * height, float(short_edge)
    longest = max(new_height, new_width)
    if longest > max_size:
        new_height *= max_size / longest
        new_width *= max_size / longest
    return max(1, int(new_height + 0.5)), max(1, int(new_width + 0.5))


def aspect_ratio_groups(widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Return 0 for images wider than high and 1 for the others, as detectron2 groups them."""
    return np.where(np.asarray(widths) > np.asarray(heights), 0, 1)
