"""The classes of a config's datasets: how many they are, for models that follow them, and names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from d2scale.coco.catalog import DatasetSpec, dataset_names, dataset_spec
from d2scale.config.class_count import class_count_key
from d2scale.config.keys import get_key, set_key
from d2scale.errors import DataError, Fault


def count_classes(name: str, cfg: Any = None) -> int | None:
    """Return the number of classes of a dataset; None if it is not known here.

    ConfigError for own datasets of ``cfg`` that do not fit together.
    """
    if name not in dataset_names(cfg):
        return None
    spec = dataset_spec(name, cfg=cfg)
    return len(_categories_of(spec) if spec.category_ids is None else spec.category_ids) or None


def known_class_names(cfg: Any) -> tuple[str, ...]:
    """Return the names of a model's classes by the datasets of ``cfg``; empty if none tells."""
    known = dataset_names(cfg)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        if name not in known:
            continue
        spec = dataset_spec(name, cfg=cfg)
        categories = {} if spec.class_names else _categories_of(spec)
        ids = [i for i in spec.category_ids or categories if i in categories]
        if names := spec.class_names or tuple(categories[i] for i in ids):
            return names
    return ()


def _categories_of(spec: DatasetSpec) -> Mapping[int, str]:
    """Return the classes in a dataset's file; empty if it cannot be read."""
    try:
        status = spec.json_file.stat()
        return _categories_in(spec.json_file, status.st_mtime_ns, status.st_size)
    except (OSError, DataError):
        return {}  # Who reads the dataset tells of it.


@lru_cache(maxsize=16)
def _categories_in(path: Path, mtime_ns: int, size: int) -> Mapping[int, str]:
    # Time and size are there for the cache: a file that has changed is read again.
    # Imported here, for it needs numpy, and planning is to begin without.
    from d2scale.coco.annotation_file import read_annotation_file

    return read_annotation_file(path).categories


def counted_classes(cfg: Any, *, unknown: int = 0) -> dict[str, int]:
    """Return the key that counts the classes of ``cfg``'s model, with the datasets' number.

    If no dataset tells it, the number is ``unknown``. Empty if that is 0, or if the key is set.
    ``cfg`` is a config of any engine, or its settings by dotted key. ConfigError for own datasets
    that do not fit together.
    """
    known, key = dataset_names(cfg), class_count_key(cfg)
    if key is None or str(get_key(cfg, key, 0)) != "0":  # a word of the command line, too
        return {}
    names = (*get_key(cfg, "DATASETS.TRAIN", ()), *get_key(cfg, "DATASETS.TEST", ()))
    counts = (count_classes(name, cfg) for name in names if name in known)
    number = next(filter(None, counts), unknown)
    return {key: number} if number else {}


def with_class_count(cfg: Any, *, unknown: int = 0) -> Any:
    """Return ``cfg``, or a copy of it in which the key that counts classes follows the datasets."""
    for key, number in counted_classes(cfg, unknown=unknown).items():
        cfg = cfg.clone()
        cfg.defrost()
        set_key(cfg, key, number)
    return cfg


def class_count_faults(cfg: Any, key: str, number: int, *, advice: str) -> list[Fault]:
    """Return, in a line for each, the counts of the datasets that are not a model's ``number``."""
    counts: dict[int, list[str]] = {}
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        if (count := count_classes(name, cfg)) not in (None, number):
            counts.setdefault(count, []).append(name)
    return [
        Fault(key, number, f"{count}, the classes of {' and '.join(names)}", advice)
        for count, names in counts.items()
    ]
