"""Reading image files."""

from __future__ import annotations

import contextlib

import numpy as np
from PIL import Image

from d2scale.errors import DataError, Fault

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_rgb(file_name: str) -> np.ndarray:
    """Return an image, upright by its EXIF orientation: RGB, shape (height, width, 3), uint8.

    Raises:
        DataError: if the file is missing, or is no image, or is cut short; it names the file.
    """
    try:
        with Image.open(file_name) as image:
            image = _make_upright(image)
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    # PIL reports broken files by each of these.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0]
        advice = f"replace it or take it out of the dataset ({type(error).__name__}: {reason})"
        raise DataError([Fault("image file", file_name, "a readable image", advice)]) from error


def _make_upright(image: Image.Image) -> Image.Image:
    orientation = 1
    # A broken EXIF block raises errors of many kinds, and says nothing about the pixels.
    with contextlib.suppress(Exception):
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
