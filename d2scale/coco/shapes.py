"""A COCO-format dataset of drawn shapes, for machines without COCO.

It has COCO's folder layout and categories, and each kind of shape is one of COCO's base classes, so
recipes, class splits and metrics work on it unchanged.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from d2scale.coco.classes import COCO_CLASSES
from d2scale.errors import DataError, Fault

# Marks a folder as written here; holds the settings.
MARKER = ".d2scale_shapes.json"
_VERSION = 1
# Every tenth image shows nothing; every ninth has a crowd too.
_EMPTY_EVERY = 10
_CROWD_EVERY = 9

Corners = list[tuple[float, float]]  # x, y in pixels
Circle = tuple[float, float, float]  # x, y of the centre and radius, in pixels


@dataclass(frozen=True)
class _Kind:
    """How a class is drawn."""

    category_id: int
    colour: tuple[int, int, int]
    corners: tuple[float, ...]  # angles of the corners on the unit circle, in turns from the top
    waist: float = 1.0  # radius of a further corner between each two: below 1 makes a star
    hole: float = 0.0  # radius of a hole in the middle


def _regular(corners: int, turn: float = 0.0) -> tuple[float, ...]:
    """Return the angles of a regular polygon's corners."""
    return tuple(corner / corners + turn for corner in range(corners))


# Stop sign, sports ball, kite, pizza, donut and book.
KINDS = (
    _Kind(13, (215, 35, 40), _regular(8, 1 / 16)),
    _Kind(37, (245, 240, 235), _regular(48)),
    _Kind(38, (120, 60, 200), _regular(5), waist=0.45),
    _Kind(59, (245, 170, 30), _regular(3)),
    _Kind(60, (235, 110, 170), _regular(48), hole=0.45),
    _Kind(84, (30, 110, 220), _regular(4, 1 / 8)),
)


def write_shapes_dataset(
    root: str | Path,
    train_images: int,
    val_images: int,
    seed: int = 0,
    image_size: tuple[int, int] = (160, 256),
    *,
    only_drawn: bool = False,
) -> Path:
    """Write ``root/coco``, unless it is there already with the same settings; return ``root``.

    The files depend on the arguments alone. They appear together, or none does.

    Args:
        root: folder to set ``DETECTRON2_DATASETS`` to.
        image_size: smallest and largest edge, pixels.
        only_drawn: list the classes of the shapes alone, as somebody's own data would; else COCO's.

    Raises:
        DataError: if ``root/coco`` holds files that were not written here, or cannot be written.
        ValueError: if a number is out of its range.
    """
    low, high = image_size
    if min(train_images, val_images) < 1 or seed < 0 or not 32 <= low <= high:
        raise ValueError(
            f"need at least one image each, a seed from 0 and edges from 32 pixels, got "
            f"{train_images}, {val_images}, {seed}, {image_size}"
        )
    root, target = Path(root), Path(root, "coco")
    settings: dict[str, Any] = {"version": _VERSION, "train_images": train_images}
    settings |= {"val_images": val_images, "seed": seed, "image_size": [low, high]}
    settings |= {"only_drawn": True} if only_drawn else {}
    if _settings_of(target) != settings:
        _refuse_foreign(target)
        try:
            _write_and_swap(target, settings)
        except OSError as error:
            advice = f"choose another folder ({error.strerror})"
            raise DataError([Fault("folder", str(root), "a writable folder", advice)]) from error
    return root


def _settings_of(folder: Path) -> Any:
    try:
        return json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return None


def _refuse_foreign(target: Path) -> None:
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not (target / MARKER).is_file():
        allowed = "a folder that is empty, not there, or holds drawn shapes"
        advice = "choose another root, or move its files away"
        raise DataError([Fault("folder", str(target), allowed, advice)])


def _write_and_swap(target: Path, settings: dict[str, Any]) -> None:
    """Write next to ``target``, then rename into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".shapes-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        (new / "annotations").mkdir(parents=True)
        for stream, part in enumerate(("train", "val")):
            (new / f"{part}2017").mkdir()
            seeds = [(settings["seed"], stream, 1 + n) for n in range(settings[f"{part}_images"])]
            content = _write_images(new / f"{part}2017", seeds, settings["image_size"])
            content["categories"] = _categories(only_drawn="only_drawn" in settings)
            (new / f"annotations/instances_{part}2017.json").write_text(json.dumps(content))
        (new / MARKER).write_text(json.dumps(settings))
        if target.exists():
            os.replace(target, old)
        os.replace(new, target)


def _write_images(
    folder: Path, seeds: Sequence[tuple[int, ...]], image_size: tuple[int, int]
) -> dict[str, Any]:
    """Write an image for each seed and return the content of the annotation file."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, seed in enumerate(seeds, start=1):
        picture, drawn = _draw_picture(number, np.random.default_rng(seed), image_size)
        name = f"{number:012d}.jpg"
        picture.save(folder / name, quality=90)
        width, height = picture.size
        images.append({"id": number, "file_name": name, "width": width, "height": height})
        for annotation in drawn:
            annotations.append({"id": len(annotations) + 1, "image_id": number, **annotation})
    return {
        "info": {"description": "drawn shapes in COCO's format"},
        "images": images,
        "annotations": annotations,
    }


def _categories(*, only_drawn: bool) -> list[dict[str, Any]]:
    ids = [kind.category_id for kind in KINDS] if only_drawn else COCO_CLASSES
    return [{"id": i, "name": COCO_CLASSES[i]} for i in ids]


def _draw_picture(
    number: int, rng: np.random.Generator, image_size: tuple[int, int]
) -> tuple[Image.Image, list[dict[str, Any]]]:
    width, height = rng.integers(image_size[0], image_size[1] + 1, size=2).tolist()
    picture = _background(rng, width, height)
    if number % _EMPTY_EVERY == 0:
        return picture, []
    annotations = []
    taken: list[Circle] = []
    for _ in range(int(rng.integers(1, 5))):
        if place := _free_place(rng, width, height, taken):
            taken.append(place)
            kind = KINDS[int(rng.integers(len(KINDS)))]
            annotations.append(_draw_shape(picture, rng, kind, place))
    if number % _CROWD_EVERY == 0:
        annotations.append(_draw_crowd(picture, rng))
    return picture, annotations


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return soft patches of grey-green and brown, with grain."""
    patches = rng.integers(70, 130, size=(5, 5, 3)).astype(np.uint8)
    soft = Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)
    grain = rng.integers(-12, 13, size=(height, width, 1))
    return Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8))


def _free_place(
    rng: np.random.Generator, width: int, height: int, taken: list[Circle]
) -> Circle | None:
    """Return centre and radius, in pixels, of a circle beside those taken; None if none is free."""
    short = min(width, height)
    for _ in range(20):
        radius = rng.uniform(0.1, 0.3) * short
        # A few reach over the edge.
        x = rng.uniform(0.8 * radius, width - 0.8 * radius)
        y = rng.uniform(0.8 * radius, height - 0.8 * radius)
        if all(math.hypot(x - a, y - b) > 0.9 * (radius + r) for a, b, r in taken):
            return x, y, radius
    return None


def _draw_shape(
    picture: Image.Image, rng: np.random.Generator, kind: _Kind, place: Circle
) -> dict[str, Any]:
    x, y, radius = place
    stretch, turn = rng.uniform(0.75, 1.0), rng.uniform(-0.04, 0.04)
    colour = np.clip(np.array(kind.colour) + rng.integers(-20, 21, 3), 0, 255)
    corners = _corners(kind, place, stretch, turn)
    background = picture.getpixel((int(x), int(y)))
    draw = ImageDraw.Draw(picture)
    draw.polygon(corners, fill=tuple(colour.tolist()), outline=(20, 20, 20))
    if kind.hole:
        hole = _corners(kind, (x, y, radius * kind.hole), stretch, turn)
        draw.polygon(hole, fill=background, outline=(20, 20, 20))
    return _annotation(corners, kind.category_id, picture.size)


def _corners(kind: _Kind, place: Circle, stretch: float = 1.0, turn: float = 0.0) -> Corners:
    x, y, radius = place
    between = 0.5 / len(kind.corners)
    corners = []
    for angle in kind.corners:
        waist = [(angle + between, kind.waist)] if kind.waist < 1 else []
        for turns, reach in [(angle, 1.0), *waist]:
            radians = 2 * math.pi * (turns + turn)
            across = radius * reach * math.sin(radians) * stretch
            corners.append((x + across, y - radius * reach * math.cos(radians)))
    return corners


def _annotation(
    corners: Corners, category_id: int, size: tuple[int, int], iscrowd: int = 0
) -> dict[str, Any]:
    columns, rows = zip(*corners, strict=True)
    x0, y0 = max(min(columns), 0.0), max(min(rows), 0.0)
    # A pixel's corner is its number; the outline fills the pixel it ends in.
    x1, y1 = min(max(columns) + 1, size[0]), min(max(rows) + 1, size[1])
    box = [round(value, 2) for value in (x0, y0, x1 - x0, y1 - y0)]
    area = round(box[2] * box[3], 2)
    return {"category_id": category_id, "bbox": box, "area": area, "iscrowd": iscrowd}


def _draw_crowd(picture: Image.Image, rng: np.random.Generator) -> dict[str, Any]:
    """Draw small shapes of one kind in a corner, annotated as one crowd."""
    kind = KINDS[int(rng.integers(len(KINDS)))]
    radius = min(picture.size) / 40
    all_corners: Corners = []
    for row, column in product(range(2), range(4)):
        corners = _corners(kind, ((2.5 * column + 2) * radius, (2.5 * row + 2) * radius, radius))
        ImageDraw.Draw(picture).polygon(corners, fill=kind.colour)
        all_corners += corners
    return _annotation(all_corners, kind.category_id, picture.size, iscrowd=1)
