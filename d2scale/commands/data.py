"""``d2scale data``: look at a dataset before training on it."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
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
    from d2scale.coco.upstream_needs import evaluation_faults
    from d2scale.report.dataset_text import config_lines, inspection_text

    if faults := [*_option_faults(arguments), *_without_effect(arguments)]:
        raise ConfigError(faults)
    cfg, settings = _config(arguments)
    named = dict.fromkeys(cfg.DATASETS.TEST, "DATASETS.TEST")
    named = dict.fromkeys(cfg.DATASETS.TRAIN, "DATASETS.TRAIN") | named
    with collecting(faults):
        check_datasets(cfg, eval_only=not cfg.DATASETS.TRAIN)
    if not faults:
        faults += _engine_faults(cfg, settings)
    for number, (name, key) in enumerate(named.items()):
        spec = dataset_spec(name, key=key, cfg=cfg)
        found = inspect_dataset(name, spec, most_images=arguments.read, progress=_with_bar)
        print("\n" * (number > 0) + inspection_text(found))
        faults += found.faults
        if arguments.output is not None:
            _write_sheet(found, Path(arguments.output), alone=len(named) == 1)
    _tell(faults)
    if _names_path(arguments.data):
        print("\n" + config_lines(name, spec, Path.cwd()), end="")
        for fault in evaluation_faults(spec):
            print(f"\nnote: detectron2 and d2go cannot evaluate on it: {fault.advice}")
    return 0


def _engine_faults(cfg: CfgNode, settings: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield what else the engine that trains a config refuses in its datasets."""
    from d2scale.coco.catalog import dataset_spec
    from d2scale.coco.upstream_needs import evaluation_faults, model_class_faults
    from d2scale.config.own_datasets import own_datasets
    from d2scale.config.upstream import engine_of

    if not settings:
        return
    own = own_datasets(cfg)
    if own:
        yield from model_class_faults(cfg, settings)
    if engine_of(settings)[0] != "default":
        for name in own:
            if name in cfg.DATASETS.TEST:
                yield from evaluation_faults(dataset_spec(name, cfg=cfg))


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
    if _names_path(arguments.data):
        return
    for option in ("images", "name"):
        if (value := getattr(arguments, option)) is not None:
            allowed = "none but for a folder or a JSON file"
            yield Fault(f"--{option}", value, allowed, "leave it out")


def _is_config(word: str) -> bool:
    return "://" in word or Path(word).suffix in (".yaml", ".yml")


def _names_path(word: str) -> bool:
    """Return whether a folder or an annotation file is given."""
    return not _is_config(word) and (Path(word).is_dir() or Path(word).suffix == ".json")


def _config(arguments: argparse.Namespace) -> tuple[CfgNode, dict[str, Any]]:
    """Return a config with the datasets that the user means, and a recipe's own settings."""
    from d2scale.coco.catalog import dataset_names
    from d2scale.coco.finding import find_dataset
    from d2scale.config import get_cfg
    from d2scale.config.loading import load_recipe

    word, path = arguments.data, Path(arguments.data)
    if _is_config(word):
        return load_recipe(word, arguments.opts)
    cfg = get_cfg()
    if _names_path(word):
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
    return cfg, {}


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
