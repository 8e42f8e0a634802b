"""Find a dataset that a user points at: a folder, an annotation file, or the images beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from d2scale.coco.annotation_file import read_annotation_file
from d2scale.coco.catalog import DatasetSpec
from d2scale.errors import DataError, Fault


def find_dataset(path: Path, images: Path | None = None) -> DatasetSpec:
    """Return where the dataset at ``path`` is: its annotation file, or the folder that holds it.

    ``images`` is the folder of its images; None: the one near it that holds the first of them, of
    several the one that the annotation file is named after. DataError if nothing is found, or more
    than one annotation file or folder, or if the file cannot be read.
    """
    json_file = _annotation_file_in(path) if path.is_dir() else path
    folder = _folder_of_images(json_file) if images is None else images
    return DatasetSpec(json_file.absolute(), folder.absolute())


def _annotation_file_in(folder: Path) -> Path:
    listed = sorted({*folder.glob("*.json"), *folder.glob("annotations/*.json")})
    found = [path for path in listed if _is_of_coco(path)] or listed
    if len(found) == 1:
        return found[0]
    names = ", ".join(str(path) for path in found) or "no JSON file"
    advice = "name the file itself, and with --images the folder of its images"
    allowed = "a folder with one annotation file, there or in annotations/"
    raise DataError([Fault("folder", str(folder), allowed, f"it has {names}; {advice}")])


def _is_of_coco(path: Path) -> bool:
    """Return whether a JSON file has the sections of an annotation file."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"images", "annotations"} <= content.keys()


def _folder_of_images(json_file: Path) -> Path:
    names = read_annotation_file(json_file).file_names
    looked = [*dict.fromkeys(_folders_near(json_file))]
    found = [folder for folder in looked if names and os.path.isfile(folder / names[0])]
    # Images of two sets are often numbered alike: instances_val2017.json means val2017.
    namesakes = [folder for folder in found if folder.name in json_file.stem]
    for folders in (found, namesakes):
        if len(folders) == 1:
            return folders[0]
    first = names[0] if names else "any image"
    allowed = f"an annotation file near the one folder that holds {first}"
    advice = f"name that folder by --images (found: {', '.join(map(str, found)) or 'none'})"
    raise DataError([Fault("annotation file", str(json_file), allowed, advice)])


def _folders_near(json_file: Path) -> Iterator[Path]:
    """Yield the file's folder and the one above, then the folders in them."""
    near = [json_file.absolute().parent]
    near += [near[0].parent] if near[0].name == "annotations" else []
    yield from near
    for folder in near:
        yield from sorted(_folders_in(folder))


def _folders_in(folder: Path) -> Iterable[Path]:
    return (path for path in folder.iterdir() if path.is_dir())
