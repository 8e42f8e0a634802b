"""``d2scale data``: look at a dataset before training on it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2scale.commands.common import Commands, add_command, write_output
from d2scale.errors import ConfigError, DataError, Fault

if TYPE_CHECKING:
    from d2scale.coco.catalog import DatasetSpec
    from d2scale.coco.inspection import Inspection

_EPILOG = """\
Faults are told as training would tell them, with exit status 2. Relative paths in a config begin
at the working directory.

examples, a folder with images and a JSON file, and what a config trains and is tested on:
  $ d2scale data leaves/ -o leaves.jpg
  $ d2scale data leaves/labels.json --images leaves/photos
  $ d2scale data recipe.yaml
"""
_MOST_FAULTS = 20
# Instead of a config key, for a dataset that a path names.
_ON_DISK = "PATH|NAME"


def add_parser(commands: Commands) -> None:
    """Add ``d2scale data``."""
    text = "look at a dataset: images, boxes, classes, faults, and the lines for a config"
    parser = add_command(commands, "data", text, run, epilog=_EPILOG, takes_opts=True)
    add = parser.add_argument
    help_text = "a folder, an annotation file in COCO's format, a config, or a dataset's name"
    add("data", metavar="PATH|NAME", help=help_text)
    add("--images", metavar="DIR", help="folder of the images (found near the annotations)")
    add("--name", help="name of the dataset in the lines for a config (by the path)")
    add("--read", type=int, metavar="N", help="images to read, spread over the dataset (all)")
    add("-o", "--output", metavar="FILE", help="draw a sheet of images with their boxes, a JPEG")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale data``."""
    from d2scale.coco.inspection import inspect_dataset
    from d2scale.report.dataset_text import config_lines, inspection_text

    faults = [] if arguments.read is None or arguments.read > 0 else [_read_fault(arguments.read)]
    if faults or (faults := _output_faults(arguments.output)):
        raise ConfigError(faults)
    targets = list(_targets(arguments))
    for number, (name, spec, key) in enumerate(targets):
        inspection = inspect_dataset(
            name, spec, key=key, most_images=arguments.read, progress=_with_bar
        )
        print("\n" * (number > 0) + inspection_text(inspection))
        if key == _ON_DISK and not inspection.faults:
            print("\n" + config_lines(inspection, Path.cwd()))
        if arguments.output is not None:
            _write_sheet(inspection, Path(arguments.output), alone=len(targets) == 1)
        faults += inspection.faults
    if faults:
        rest = len(faults) - _MOST_FAULTS
        if rest > 0:
            print(f"the first {_MOST_FAULTS} faults; {rest} more", file=sys.stderr)
        raise DataError(faults[:_MOST_FAULTS])
    return 0


def _read_fault(value: int) -> Fault:
    return Fault("--read", value, "a whole number from 1", "leave it out to read all")


def _output_faults(output: str | None) -> list[Fault]:
    if output is None:
        return []
    path = Path(output).absolute()
    if path.suffix.lower() in (".jpg", ".jpeg") and path.parent.is_dir():
        return []
    allowed = "a file .jpg in a folder that is there"
    return [Fault("--output", output, allowed, "correct the name, or make the folder")]


def _targets(arguments: argparse.Namespace) -> Iterator[tuple[str, DatasetSpec, str]]:
    """Yield name, place and the key that named it, of each dataset that the user means."""
    from d2scale.coco.catalog import dataset_names, dataset_spec
    from d2scale.coco.finding import find_dataset

    word, path = arguments.data, Path(arguments.data)
    images = None if arguments.images is None else Path(arguments.images)
    if path.is_dir() or path.suffix == ".json":
        spec = find_dataset(path, images)
        yield arguments.name or _name_of(path), spec, _ON_DISK
    elif "://" in word or path.suffix in (".yaml", ".yml"):
        yield from _targets_of_config(word, arguments.opts)
    elif word in dataset_names():
        yield word, dataset_spec(word), "DATASETS"
    else:
        allowed = f"a folder, a file .json or .yaml, or one of {', '.join(dataset_names())}"
        raise DataError([Fault(_ON_DISK, word, allowed, "check the path")])


def _targets_of_config(config: str, opts: list[str]) -> Iterator[tuple[str, DatasetSpec, str]]:
    from d2scale.coco.catalog import dataset_spec
    from d2scale.config.loading import load_recipe

    cfg, _ = load_recipe(config, opts)
    named: dict[str, str] = {}
    for part in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[part]:
            named.setdefault(name, f"DATASETS.{part}")
    if not named:
        raise DataError([Fault("DATASETS.TRAIN", (), "at least one dataset", "name one")])
    for name, key in named.items():
        yield name, dataset_spec(name, key=key, cfg=cfg), key


def _name_of(path: Path) -> str:
    """Return a name for the dataset at ``path``: letters, digits, dots, dashes and lines."""
    return re.sub(r"[^\w.-]+", "_", path.absolute().with_suffix("").name) or "mine"


def _with_bar(items: Iterable[Any], total: int) -> Iterable[Any]:
    from tqdm import tqdm

    # None: only where a person is watching.
    return tqdm(items, "images", total, disable=None, leave=False)


def _write_sheet(inspection: Inspection, path: Path, *, alone: bool) -> None:
    from d2scale.report.dataset_sheet import dataset_sheet

    content = dataset_sheet(inspection)
    if content is None:
        print(f"no sheet: no image of {inspection.name} can be read", file=sys.stderr)
        return
    target = path if alone else path.with_stem(f"{path.stem}-{inspection.name}")
    write_output(content, str(target))
    print(f"\n{os.path.relpath(target)}")
