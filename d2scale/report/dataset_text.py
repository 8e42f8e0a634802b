"""What a look at a dataset has shown, in words, and the lines that name it in a config."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from d2scale.coco.annotation_file import AnnotationFile, examples
from d2scale.coco.catalog import DatasetSpec
from d2scale.coco.inspection import Inspection
from d2scale.coco.matching import AREAS
from d2scale.config.own_datasets import SECTION
from d2scale.errors import printable
from d2scale.planning.formats import table

_SIZES = ("small (below 32 x 32 pixels)", "medium", "large (from 96 x 96)")


def inspection_text(inspection: Inspection) -> str:
    """Return the facts of a dataset, a line each, and a table of its classes."""
    file = inspection.file
    facts = [
        ("dataset", inspection.name),
        ("annotations", str(inspection.spec.json_file)),
        ("images", str(inspection.spec.image_root)),
    ]
    parts = []
    if file is not None and len(file.image_ids):
        facts += [*_image_facts(inspection, file), *_box_facts(inspection, file)]
        parts.append(_class_table(inspection, file))
    facts += [
        ("odd images", f"{len(names)} {kind} ({examples(names)})")
        for kind, names in inspection.odd.items()
    ]
    if file is not None:
        facts.append(("images read", f"{inspection.images_read} of {len(file.image_ids)}"))
    lines = "\n".join(f"{name and name + ':':13}{printable(value)}" for name, value in facts)
    return "\n\n".join([lines, *parts])


def _image_facts(inspection: Inspection, file: AnnotationFile) -> Iterator[tuple[str, str]]:
    counts = _boxes_by_image(inspection, file)
    without = int((counts == 0).sum())
    text = f"{len(counts)}, {without} of them without boxes"
    filtered = "left out of training unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
    yield "", text + (f" ({filtered})" if without else "")
    areas = file.widths * file.heights
    ends = (f"{file.widths[n]} x {file.heights[n]}" for n in (areas.argmin(), areas.argmax()))
    wide = int((file.widths > file.heights).sum())
    text = f"{' to '.join(dict.fromkeys(ends))} pixels, {wide} of {len(areas)} wider than high"
    yield "sizes", text


def _boxes_by_image(inspection: Inspection, file: AnnotationFile) -> np.ndarray:
    numbers = file.image_numbers[inspection.boxes_of_classes()]
    return np.bincount(numbers, minlength=len(file.image_ids))


def _box_facts(inspection: Inspection, file: AnnotationFile) -> Iterator[tuple[str, str]]:
    kept, counts = inspection.boxes_of_classes(), _boxes_by_image(inspection, file)
    text = f"{kept.sum()}"
    if kept.any():
        text += f", {np.median(counts[counts > 0]):g} an image (at most {counts.max()})"
    if file.crowds.any():
        text += f"; {file.crowds.sum()} crowds are not trained on"
    yield "boxes", text
    sides = file.boxes[kept, 2:]
    if len(sides):
        areas = sides.prod(axis=1)
        parts = [((areas >= low) & (areas < high)).sum() for low, high in AREAS[1:]]
        yield "", ", ".join(f"{n} {size}" for n, size in zip(parts, _SIZES, strict=True))


def _class_table(inspection: Inspection, file: AnnotationFile) -> str:
    kept = inspection.boxes_of_classes()
    rows = []
    for number, category_id in enumerate(inspection.category_ids):
        of_class = kept & (file.category_ids == category_id)
        images = len(np.unique(file.image_numbers[of_class]))
        rows.append((number, file.categories.get(category_id), int(of_class.sum()), images))
    return table(["class", "name", "boxes", "images"], rows)


def config_lines(name: str, spec: DatasetSpec, working_directory: Path) -> str:
    """Return the lines of a config that bring the dataset along and train on it.

    Paths within the working directory are relative to it.
    """
    paths = (
        str(path.relative_to(working_directory) if path.is_relative_to(working_directory) else path)
        for path in (spec.image_root, spec.json_file)
    )
    keys = zip(("NAMES", "IM_DIRS", "JSON_FILES"), (name, *paths), strict=True)
    nested: dict[str, object] = {key: [value] for key, value in keys}
    for part in reversed(SECTION.split(".")):
        nested = {part: nested}
    lines = {**nested, "DATASETS": {"TRAIN": [name]}}
    text = yaml.safe_dump(lines, sort_keys=False, default_flow_style=None, width=1000)
    return f"lines for a config:\n{text}"
