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
from d2scale.errors import ConfigError, DataError, Fault, collecting

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

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
    from d2scale.coco.catalog import dataset_spec
    from d2scale.coco.dataset import check_datasets
    from d2scale.coco.inspection import inspect_dataset
    from d2scale.report.dataset_text import config_lines, inspection_text

    if faults := [*_option_faults(arguments), *_without_effect(arguments)]:
        raise ConfigError(faults)
    cfg, on_disk = _config(arguments)
    named = dict.fromkeys(cfg.DATASETS.TEST, "DATASETS.TEST")
    named = dict.fromkeys(cfg.DATASETS.TRAIN, "DATASETS.TRAIN") | named
    with collecting(faults):
        check_datasets(cfg, eval_only=not cfg.DATASETS.TRAIN)
    for number, (name, key) in enumerate(named.items()):
        spec = dataset_spec(name, key=key, cfg=cfg)
        found = inspect_dataset(name, spec, most_images=arguments.read, progress=_with_bar)
        print("\n" * (number > 0) + inspection_text(found))
        faults += found.faults
        if arguments.output is not None:
            _write_sheet(found, Path(arguments.output), alone=len(named) == 1)
    _tell(faults)
    if on_disk:
        print("\n" + config_lines(name, spec, Path.cwd()), end="")
    return 0


def _tell(faults: list[Fault]) -> None:
    rest = len(faults) - _MOST_FAULTS
    print(f"\nfaults:      {len(faults) or 'none'}")
    if rest > 0:
        print(f"the first {_MOST_FAULTS} faults; {rest} more", file=sys.stderr)
    if faults:
        raise DataError(faults[:_MOST_FAULTS])


def _option_faults(arguments: argparse.Namespace) -> Iterator[Fault]:
    if arguments.read is not None and arguments.read < 1:
        advice = "leave it out to read all"
        yield Fault("--read", arguments.read, "a whole number from 1", advice)
    path = Path(arguments.output or "sheet.jpg").absolute()
    if path.suffix.lower() not in (".jpg", ".jpeg") or not path.parent.is_dir():
        allowed = "a file .jpg in a folder that is there"
        yield Fault("--output", arguments.output, allowed, "correct the name, or make the folder")


def _without_effect(arguments: argparse.Namespace) -> Iterator[Fault]:
    """Yield what is given for another kind of PATH|NAME than this one."""
    if arguments.opts and not _is_config(arguments.data):
        yield Fault("KEY VALUE", " ".join(arguments.opts), "none but for a config", "leave it out")
    if not _is_config(arguments.data) and _is_on_disk(Path(arguments.data)):
        return
    for option in ("images", "name"):
        if (value := getattr(arguments, option)) is not None:
            allowed = "none but for a folder or a JSON file"
            yield Fault(f"--{option}", value, allowed, "leave it out")


def _is_config(word: str) -> bool:
    return "://" in word or Path(word).suffix in (".yaml", ".yml")


def _is_on_disk(path: Path) -> bool:
    return path.is_dir() or path.suffix == ".json"


def _config(arguments: argparse.Namespace) -> tuple[CfgNode, bool]:
    """Return a config with the datasets that the user means, and whether a path names them."""
    from d2scale.coco.catalog import dataset_names
    from d2scale.coco.finding import find_dataset
    from d2scale.config import get_cfg
    from d2scale.config.loading import load_recipe

    word, path = arguments.data, Path(arguments.data)
    if _is_config(word):
        return load_recipe(word, arguments.opts)[0], False
    cfg, on_disk = get_cfg(), _is_on_disk(path)
    if on_disk:
        images = None if arguments.images is None else Path(arguments.images)
        own, spec = cfg.D2GO_DATA.DATASETS.COCO_INJECTION, find_dataset(path, images)
        word = arguments.name or _name_of(path)
        own.NAMES, own.IM_DIRS, own.JSON_FILES = (
            [str(value)] for value in (word, spec.image_root, spec.json_file)
        )
    elif word not in dataset_names():
        allowed = f"a folder, a file .json or .yaml, or one of {', '.join(dataset_names())}"
        raise DataError([Fault("PATH|NAME", word, allowed, "check the path")])
    cfg.DATASETS.TRAIN = (word,)
    return cfg, on_disk


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
    print(f"\nsheet:       {os.path.relpath(target)}")
