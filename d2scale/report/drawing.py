"""Boxes with class names and scores, drawn on images.

Not torchvision's ``draw_bounding_boxes``: it writes labels inside the boxes, where they hide small
objects and are cut off at the edge of the image; its older versions give them no background.
"""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

# Neighbouring classes get hues that are far apart. Every 13th, 21st and 34th comes back to nearly
# the same one, and then differs in saturation and brightness.
_GOLDEN_RATIO = 0.618033988749895
_SATURATIONS = (0.8, 0.45, 0.95, 0.6)
_BRIGHTNESSES = (0.95, 1.0, 0.7, 0.8)
_PADDING = 2
_LONGEST_EDGE = 65500  # pixels, of a JPEG file


def class_colour(number: int) -> Colour:
    """Return red, green and blue for a class: always the same, whatever else is drawn."""
    hue = (0.58 + number * _GOLDEN_RATIO) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, _SATURATIONS[number % 4], _BRIGHTNESSES[number % 4])
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    classes: np.ndarray,
    class_names: Sequence[str],
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """Draw boxes with their labels on a copy of an image, the highest score last, on top.

    Boxes that are not finite or lie outside the image are left out.

    Args:
        image: RGB, shape (height, width, 3), uint8.
        boxes: x0 y0 x1 y1 in pixels of the image, shape (n, 4).
        classes: class numbers, shape (n,).
        class_names: by class number; a class without a name, or with a character that the font
            lacks, is labelled by its number.
        scores: shape (n,), from 0 to 1; None draws none.

    Raises:
        ValueError: if the image is no RGB image, or the arrays disagree in length.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"need an RGB image in uint8, got {image.shape} in {image.dtype}")
    counts = {len(boxes), len(classes), len(boxes) if scores is None else len(scores)}
    if len(counts) > 1:
        raise ValueError(f"need as many boxes as classes and scores, got {sorted(counts)}")
    picture = Image.fromarray(image)
    order = range(len(boxes)) if scores is None else np.argsort(scores, kind="stable").tolist()
    for row in order:
        number = int(classes[row])
        name = class_names[number] if 0 <= number < len(class_names) else str(number)
        label = name if all(map(_has_glyph, name)) else str(number)
        label += "" if scores is None else f" {float(scores[row]):.2f}"
        _draw_box(picture, boxes[row].tolist(), label, class_colour(number))
    return np.asarray(picture)


def to_jpeg(image: np.ndarray, quality: int) -> bytes:
    """Return a file's content: ``image`` is RGB, shape (height, width, 3), uint8.

    A picture that is too large for the format is made smaller.
    """
    content, picture = io.BytesIO(), Image.fromarray(image)
    picture.thumbnail((_LONGEST_EDGE, _LONGEST_EDGE))
    picture.save(content, format="jpeg", quality=quality)
    return content.getvalue()


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


@cache
def _has_glyph(character: str) -> bool:
    """Return whether the font can draw a character; what it cannot, it draws as one empty box."""
    drawn, missing = (_font(11).getmask(text) for text in (character, "\uffff"))
    return bytes(drawn) != bytes(missing)


def _draw_box(picture: Image.Image, box: Sequence[float], label: str, colour: Colour) -> None:
    """Draw a box, and its label above it, or inside it at the top edge of the image."""
    if not np.isfinite(box).all():
        return
    width, height = picture.size
    x0, x1 = max(box[0], 0.0), min(box[2], width - 1.0)
    y0, y1 = max(box[1], 0.0), min(box[3], height - 1.0)
    if x1 < x0 or y1 < y0:
        return
    draw = ImageDraw.Draw(picture)
    draw.rectangle((x0, y0, x1, y1), outline=colour, width=max(2, round(min(picture.size) / 240)))
    font = _font(max(11, min(picture.size) // 32))
    left, top, right, bottom = draw.textbbox((0, 0), label, font=font)
    label_width = right - left + 2 * _PADDING
    label_height = bottom - top + 2 * _PADDING
    x = max(0.0, min(x0, width - label_width))
    y = y0 - label_height if y0 >= label_height else y0
    draw.rectangle((x, y, x + label_width, y + label_height), fill=colour)
    dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    ink = (0, 0, 0) if dark else (255, 255, 255)
    draw.text((x + _PADDING - left, y + _PADDING - top), label, fill=ink, font=font)
