"""A sheet of a dataset's images with their boxes: wrong boxes are seen at a glance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from d2scale.coco.inspection import Inspection
from d2scale.errors import DataError
from d2scale.report.detections import EvaluationSet
from d2scale.report.drawing import to_jpeg
from d2scale.report.examples import draw_truth, read_images, spread_images

IMAGES = 12
_COLUMNS = 4
_CELL = (320, 400)  # height and width, pixels
_GAP = 8
_QUALITY = 88


def dataset_sheet(inspection: Inspection, wanted: int = IMAGES) -> bytes | None:
    """Return a JPEG file of ``wanted`` images with their boxes; None if no image can be read.

    One of each odd kind comes first, then images with a few boxes from all over the dataset.
    """
    if inspection.file is None:
        return None
    spec, ids = inspection.spec, inspection.category_ids
    known = tuple(sorted(i for i in ids if i in inspection.file.categories))
    dataset = EvaluationSet(inspection.name, inspection.file, spec.image_root, known)
    rows = {name: row for row, name in enumerate(inspection.file.file_names)}
    odd = [rows[names[0]] for names in inspection.odd.values()]
    order = dict.fromkeys([*odd, *spread_images(dataset, wanted)])
    errors: list[tuple[Path, DataError]] = []
    candidates = ((dataset.path_of(row), row) for row in order)
    cells = [
        draw_truth(image, dataset, row, _CELL)
        for _, row, image in read_images(candidates, wanted, errors)
    ]
    return to_jpeg(_tiled(cells), _QUALITY) if cells else None


def _tiled(cells: Sequence[np.ndarray]) -> np.ndarray:
    """Return images of at most ``_CELL`` side by side, each in the middle of its cell."""
    height, width = _CELL
    columns = min(_COLUMNS, len(cells))
    size = (
        columns * (width + _GAP) + _GAP,
        math.ceil(len(cells) / columns) * (height + _GAP) + _GAP,
    )
    sheet = Image.new("RGB", size, (255, 255, 255))
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        left = _GAP + column * (width + _GAP) + (width - cell.shape[1]) // 2
        top = _GAP + row * (height + _GAP) + (height - cell.shape[0]) // 2
        sheet.paste(Image.fromarray(cell), (left, top))
    return np.asarray(sheet)
