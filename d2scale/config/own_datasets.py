"""The COCO-format datasets that a config brings along, under d2go's keys for every engine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from d2scale.config.keys import get_key, set_key
from d2scale.errors import DataError, Fault

SECTION = "D2GO_DATA.DATASETS.COCO_INJECTION"
NAMES, IM_DIRS, JSON_FILES = KEYS = tuple(
    f"{SECTION}.{key}" for key in ("NAMES", "IM_DIRS", "JSON_FILES")
)


class OwnDataset(NamedTuple):
    """Where a dataset is; both paths are absolute."""

    json_file: Path
    image_root: Path  # the folder that the file names in it are relative to


def add_own_datasets_keys(cfg: Any) -> None:
    """Add what d2go has and ``cfg`` lacks of the keys that name datasets, in place."""
    node = cfg
    for part in SECTION.split("."):
        node = node.setdefault(part, type(cfg)())
    for key in KEYS:
        node.setdefault(key.rpartition(".")[2], [])


def own_datasets(cfg: Mapping[str, Any]) -> dict[str, OwnDataset]:
    """Return the datasets that ``cfg`` brings along, by name; their files need not be there.

    ``cfg`` is a config of any engine, or its settings by dotted key. Relative paths resolve under
    the working directory, as d2go opens them. DataError for lists that do not fit together::

        D2GO_DATA:
          DATASETS:
            COCO_INJECTION:
              NAMES: [leaves]
              IM_DIRS: [leaves/images]
              JSON_FILES: [leaves/annotations.json]
    """
    columns = {key: get_key(cfg, key, ()) for key in KEYS}
    if faults := list(_list_faults(columns)):
        raise DataError(faults)
    return {
        name: OwnDataset(Path(json_file).absolute(), Path(image_root).absolute())
        for name, image_root, json_file in zip(*columns.values(), strict=True)
    }


def _list_faults(columns: Mapping[str, Any]) -> Iterator[Fault]:
    faulty = [
        key
        for key, values in columns.items()
        if not isinstance(values, list | tuple)
        or not all(isinstance(value, str) and value for value in values)
    ]
    for key in faulty:
        yield Fault(key, columns[key], "a list of names", "write it as [ONE, ANOTHER]")
    if faulty:
        return
    names = columns[NAMES]
    if wrong := [name for name in names if not _names_a_folder(name)]:
        # A folder of the run's results has it.
        allowed = "names without slashes and control characters, as a folder can have"
        yield Fault(NAMES, wrong, allowed, "rename the dataset")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        advice = "give each dataset a name of its own"
        yield Fault(NAMES, list(names), "names that differ", f"{', '.join(repeated)}: {advice}")
    for key in (IM_DIRS, JSON_FILES):
        if len(columns[key]) != len(names):
            allowed = f"{len(names)} of them, as {NAMES} has names"
            yield Fault(
                key, list(columns[key]), allowed, "give each dataset one, in the same order"
            )
        if wrong := [path for path in columns[key] if not _can_be_a_path(path)]:
            allowed = "paths without null characters and lone surrogates"
            yield Fault(key, wrong, allowed, "correct them")


def _names_a_folder(name: str) -> bool:
    return name == Path(name).name != ".." and name.isprintable()


def _can_be_a_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def make_paths_absolute(cfg: Any) -> None:
    """Let ``cfg`` name its own datasets by absolute paths, in place, for use in other folders."""
    if own := own_datasets(cfg):
        set_key(cfg, JSON_FILES, [str(dataset.json_file) for dataset in own.values()])
        set_key(cfg, IM_DIRS, [str(dataset.image_root) for dataset in own.values()])


def annotation_digests(cfg: Any, *, tested: bool = False) -> dict[str, str]:
    """Return a digest of the annotation file of each own dataset that ``cfg`` trains on.

    With ``tested``, of those that it is tested on, too.
    """
    keys = ("DATASETS.TRAIN", *["DATASETS.TEST"] * tested)
    named = {name for key in keys for name in get_key(cfg, key, ())}
    own = own_datasets(cfg).items()
    return file_digests({name: dataset.json_file for name, dataset in own if name in named})


def file_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Return a digest of the annotation file of each dataset; ``files`` are by its name.

    Paths differ from machine to machine; a digest is the same wherever the same annotations are.
    It takes 0.5 s for train2017. A file that cannot be read is left out: whoever reads the dataset
    tells of it.
    """
    digests = {}
    for name, path in files.items():
        with suppress(OSError):
            status = path.stat()
            digest = _file_digest(path, status.st_mtime_ns, status.st_size)
            digests[f"annotations of {name} (digest)"] = digest
    return digests


@lru_cache(maxsize=64)
def _file_digest(path: Path, mtime_ns: int, size: int) -> str:
    # Time and size are there for the cache: a file that has changed is read again.
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()[:16]
