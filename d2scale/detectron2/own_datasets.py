"""A config's own COCO-format datasets in detectron2's catalogs, which a process has once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from d2scale.coco.catalog import DatasetSpec, dataset_spec
from d2scale.coco.dataset import check_files_exist
from d2scale.coco.upstream_needs import evaluation_faults, model_class_faults
from d2scale.config.own_datasets import NAMES, own_datasets
from d2scale.errors import Fault, collecting

# Names in the catalogs that come from a config of this process.
_registered: set[str] = set()


def own_dataset_faults(cfg: Any) -> list[Fault]:
    """Return what is wrong with the datasets that a config brings along."""
    faults: list[Fault] = []
    with collecting(faults):
        own = own_datasets(cfg)
        for name in own:
            spec = dataset_spec(name, cfg=cfg)
            faults += _faults_of_name(name, spec)
            with collecting(faults):
                check_files_exist(name, spec, key=NAMES)
                if name in cfg.DATASETS.TEST:
                    faults += evaluation_faults(spec)
        if own:
            faults += model_class_faults(cfg)
    return faults


def _faults_of_name(name: str, spec: DatasetSpec) -> Iterator[Fault]:
    if name in DatasetCatalog.list() and name not in _registered and not _is_at(name, spec):
        yield Fault(NAMES, name, "a name that detectron2 has not yet", "rename the dataset")


def _is_at(name: str, spec: DatasetSpec) -> bool:
    """Return whether a name in detectron2's catalog stands for the files of ``spec``."""
    json_file = MetadataCatalog.get(name).get("json_file", "")
    return Path(json_file).absolute() == spec.json_file


def register_own_datasets(cfg: Any) -> None:
    """Put the datasets that ``cfg`` brings along into detectron2's catalogs."""
    for name in own_datasets(cfg):
        spec = dataset_spec(name, cfg=cfg)
        if name in DatasetCatalog.list():
            if _is_at(name, spec):
                continue
            _forget(name)
        register_coco_instances(name, {}, str(spec.json_file), str(spec.image_root))
        _registered.add(name)


@contextmanager
def registered_by_d2go(cfg: Any) -> Iterator[None]:
    """Within the context d2go may register what ``cfg`` brings along, though it is known already.

    d2go has an assertion against that, and a process may train twice.
    """
    own = own_datasets(cfg)
    for name in {*own, *_registered} & {*DatasetCatalog.list()}:
        _forget(name)
    yield
    _registered.update(own)


def _forget(name: str) -> None:
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    _registered.discard(name)
