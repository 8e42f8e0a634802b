"""Names of datasets, and where their files are.

Relative paths of registered datasets resolve under the folder in the environment variable
``DETECTRON2_DATASETS`` (default ``datasets``) when a dataset is read. A config's own datasets are
looked up in that config alone, so two configs of a process can give one name to different files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d2scale.coco import classes
from d2scale.config.own_datasets import NAMES, SECTION, own_datasets
from d2scale.errors import DataError, Fault

ROOT_VARIABLE = "DETECTRON2_DATASETS"


@dataclass(frozen=True)
class DatasetSpec:
    """Where a COCO-format dataset is, and which classes are read from it."""

    json_file: Path
    image_root: Path  # the folder that the file names in it are relative to
    # Of the classes to read, in the order of the model's class numbers; None reads all that the
    # file lists, by ascending id.
    category_ids: tuple[int, ...] | None = None
    # The names that the file must have for them; None allows any.
    class_names: tuple[str, ...] | None = None


_DATASETS = {
    name.format(part): DatasetSpec(
        Path(f"coco/annotations/instances_{part}2017.json"),
        Path(f"coco/{part}2017"),
        ids,
        tuple(classes.COCO_CLASSES[category_id] for category_id in ids),
    )
    for part in ("train", "val")
    for name, ids in (
        ("coco_2017_{}", classes.ALL_CATEGORY_IDS),
        ("coco_pretrain_{}_base", classes.BASE_CATEGORY_IDS),
        ("coco_pretrain_{}_novel", classes.NOVEL_CATEGORY_IDS),
        ("coco_pretrain_{}_all", classes.ALL_CATEGORY_IDS),
    )
}


def datasets_root() -> Path:
    """Return the folder that datasets resolve under."""
    return Path(os.environ.get(ROOT_VARIABLE, "datasets")).expanduser()


def path_advice(absent: Sequence[Path]) -> str:
    """Return what to do about files of a dataset that are not there."""
    root = datasets_root()
    if all(path.is_relative_to(root) for path in absent):
        return f"set {ROOT_VARIABLE} to the folder that holds coco/ (now {root.absolute()})"
    return f"correct the path (relative ones begin at {Path.cwd()})"


def dataset_names(cfg: Any = None) -> tuple[str, ...]:
    """Return every registered name, and those of ``cfg``'s own datasets."""
    return tuple(sorted(_known(cfg)))


def _known(cfg: Any) -> dict[str, DatasetSpec]:
    """Return all datasets by name; DataError where ``cfg`` gives the name of one to another."""
    own = {name: DatasetSpec(*files) for name, files in own_datasets(cfg or {}).items()}
    root = datasets_root().absolute()
    allowed = f"a name other than {', '.join(sorted(_DATASETS))}"
    taken = [
        Fault(NAMES, name, allowed, "rename the dataset")
        for name, spec in own.items()
        if name in _DATASETS and _under(root, _DATASETS[name]) != spec
    ]
    if taken:
        raise DataError(taken)
    return {**_DATASETS, **own}


def _under(root: Path, spec: DatasetSpec) -> DatasetSpec:
    return replace(spec, json_file=root / spec.json_file, image_root=root / spec.image_root)


def register_coco_dataset(
    name: str,
    json_file: str | Path,
    image_root: str | Path,
    category_ids: Sequence[int] | None = None,
) -> None:
    """Register a COCO-format dataset for ``DATASETS.TRAIN`` and ``DATASETS.TEST``.

    Paths are absolute or relative to :func:`datasets_root`; for ``category_ids`` see
    :class:`DatasetSpec`.

    Raises:
        ValueError: if the name is taken by other files or classes.
    """
    ids = None if category_ids is None else tuple(category_ids)
    spec = DatasetSpec(Path(json_file), Path(image_root), ids)
    if _DATASETS.setdefault(name, spec) != spec:
        raise ValueError(f"dataset {name!r} is already registered as {_DATASETS[name]}")


def dataset_spec(name: str, *, key: str = "DATASETS", cfg: Any = None) -> DatasetSpec:
    """Look up a name and resolve its paths; ``cfg`` may bring datasets of its own.

    Raises:
        DataError: if the name, which ``key`` of the config held, is not known.
        ConfigError: if the lists of ``cfg``'s own datasets do not fit together.
    """
    known = _known(cfg)
    if name not in known:
        advice = f"correct the name, or give its files in {SECTION}"
        raise DataError([Fault(key, name, ", ".join(sorted(known)), advice)])
    return _under(datasets_root(), known[name])
