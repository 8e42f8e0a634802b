"""Reading image files, of whatever kind, and telling their kind."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from d2scale.errors import DataError, Fault, one_line

_EXIF_ORIENTATION = 0x0112
# A file is read as one of these, whatever its name ends in: for some others (EPS) PIL starts a
# program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
_DEEP = "of more than 8 bits, read as RGB where no value is above 255"
_SEE_THROUGH = "transparent in parts, read in the colour that is beneath"
# By PIL's name for how pixels are stored. detectron2 reads all of them in the same way.
_ODD_MODES = {
    "RGB": "",
    "1": "black and white, read as RGB",
    "L": "grayscale, read as RGB",
    "P": "of a palette, read as RGB",
    "CMYK": "CMYK, read as RGB",
    **dict.fromkeys(("LA", "PA", "RGBA", "La", "RGBa"), _SEE_THROUGH),
    **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N", "I", "F"), _DEEP),
}
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
        DataError: if the file is missing, or is no image, or is cut short, or has values that 8
            bits cannot hold; it names the file.
    """
    try:
        with Image.open(file_name, formats=_FORMATS) as image:
            image = _make_upright(image)
            if _ODD_MODES.get(image.mode) == _DEEP:
                return _deep_to_rgb(file_name, np.asarray(image))
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # at once to RGB gives the same, and a warning
            return np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except DataError:
        raise
    except Exception as error:  # broken files raise nearly any type in PIL
        advice = f"replace it or take it out of the dataset ({type(error).__name__}: "
        advice += f"{one_line(error)})"
        allowed = f"a readable image ({', '.join(_FORMATS)})"
        raise DataError([Fault("image file", file_name, allowed, advice)]) from error


def _deep_to_rgb(file_name: str, values: np.ndarray) -> np.ndarray:
    """Return an image of one deep channel as RGB; DataError unless its values are those of bytes.

    PIL would make all that is above 255 white. Which value is to be white, only the user knows.
    """
    if not ((values >= 0) & (values <= 255) & (values % 1 == 0)).all():
        allowed = "an image of whole numbers from 0 to 255"
        advice = f"it has {values.min():g} to {values.max():g}; bring all images to 8 bits first"
        raise DataError([Fault("image file", file_name, allowed, advice)])
    return np.repeat(values.astype(np.uint8)[..., None], 3, axis=2)


def _make_upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _orientation(image: Image.Image) -> int:
    # A broken EXIF block raises errors of many kinds, and says nothing about the pixels.
    with contextlib.suppress(Exception):
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    return 1


def check_size(file_name: str, size: Sequence[int], height: int, width: int) -> None:
    """Raise DataError if an image's ``size``, height and width, is not its annotation file's.

    Boxes would then lie in the wrong place.
    """
    if tuple(size) != (height, width):
        allowed = f"{width} x {height}, as its annotation file says"
        advice = "correct the annotation file, or use the image that it was made for"
        told = f"{size[1]} x {size[0]}"
        raise DataError([Fault(f"size of image {file_name}", told, allowed, advice)])


def oddities(file_name: str) -> list[str]:
    """Return how an image differs from an upright photograph in RGB, and how it is read.

    Empty also for a file that cannot be opened, of which :func:`read_rgb` tells.
    """
    try:
        with Image.open(file_name, formats=_FORMATS) as image:
            found = [_ODD_MODES.get(image.mode, f"{image.mode}, read as RGB")]
            if image.mode == "P" and "transparency" in image.info:
                found = [_ODD_MODES["PA"]]
            if _orientation(image) in _UPRIGHT:
                found.append("turned by their EXIF orientation, read upright")
            if getattr(image, "n_frames", 1) > 1:
                found.append("of several frames, of which the first is read")
    except Exception:
        return []
    return [text for text in found if text]
