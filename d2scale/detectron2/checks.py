"""What of a recipe can be judged before anything is built of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY
from omegaconf import OmegaConf

from d2scale.coco.catalog import dataset_names
from d2scale.config.keys import get_key
from d2scale.config.own_datasets import NAMES
from d2scale.detectron2.last_checkpoint import check_readable, last_whole_checkpoint
from d2scale.detectron2.own_datasets import own_dataset_faults
from d2scale.errors import Fault, collecting

_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
}
# torch's own, by detectron2's names and by its class.
_NORMS_OF_GPUS = ("SyncBN", "nnSyncBN", "SyncBatchNorm")


def model_faults(cfg: Any) -> list[Fault]:
    """Return which parts of a config's model detectron2 does not know."""
    return [
        Fault(key, get_key(cfg, key), "a name that is registered", "correct it, or register it")
        for key, registry in _REGISTRIES.items()
        if get_key(cfg, key) not in registry
    ]


def weights_faults(weights: str | None) -> list[Fault]:
    """Return what is wrong with the file of a model's first weights, which is read."""
    path = (weights or "").partition("?")[0]  # as detectron2: behind it stand options
    if not path or "://" in path:
        return []
    if not Path(path).is_file():
        advice = 'correct the path; "" trains from random weights'
        return [Fault("MODEL.WEIGHTS", weights, "a file that exists", advice)]
    faults: list[Fault] = []
    with collecting(faults):
        check_readable(Path(path))
    return faults


def beginning_faults(
    weights: str | None, folder: Path, *, resume: bool, eval_only: bool
) -> list[Fault]:
    """Return what is wrong with that which a run begins with: a checkpoint, or first weights."""
    faults: list[Fault] = []
    with collecting(faults):
        if resume and last_whole_checkpoint(folder) is not None:
            return []
        if eval_only and not weights:
            advice = "name them, or use --resume for the last checkpoint"
            return [Fault("MODEL.WEIGHTS", "", "weights to evaluate", advice)]
        return weights_faults(weights)
    return faults


def norm_faults(settings: Mapping[str, Any], processes: int) -> list[Fault]:
    """Return which norms cannot be trained on so many processes without CUDA."""
    allowed = f"a norm that is not synchronised, on {processes} processes without CUDA"
    return [
        Fault(key, value, allowed, "train on one process, or on GPUs")
        for key, value in settings.items()
        if processes > 1 and isinstance(value, str) and value.rpartition(".")[2] in _NORMS_OF_GPUS
    ]


def dataset_faults(cfg: Any, *, eval_only: bool) -> list[Fault]:
    """Return what is wrong with the datasets of a config, without reading them."""
    faults: list[Fault] = []
    if not cfg.DATASETS.TRAIN and not eval_only:
        faults.append(Fault("DATASETS.TRAIN", (), "the name of a dataset", "give one"))
    names = [] if eval_only else [("DATASETS.TRAIN", name) for name in cfg.DATASETS.TRAIN]
    names += [("DATASETS.TEST", name) for name in cfg.DATASETS.TEST]
    faults += own_dataset_faults(cfg)
    # register_datasets will look for the files of d2scale's own.
    own = {*dataset_names()} - {*DatasetCatalog.list()} | {*get_key(cfg, NAMES, ())}
    return faults + _faults_of_names([pair for pair in names if pair[1] not in own])


def lazy_dataset_faults(cfg: Any, *, eval_only: bool) -> list[Fault]:
    """Return what is wrong with the datasets that a LazyConfig names, without reading them."""
    faults: list[Fault] = []
    names: list[tuple[str, str]] = []
    if not eval_only and _is_of_detectron2(cfg.dataloader.train):
        faults += [
            Fault(f"dataloader.train.{name}", None, "what detectron2's loader needs", "give one")
            for name in ("dataset", "mapper")
            if cfg.dataloader.train.get(name) is None
        ]
    for part in ("test",) if eval_only else ("train", "test"):
        key = f"dataloader.{part}.dataset.names"
        named = OmegaConf.select(cfg, key, default=())
        names += [(key, name) for name in ((named,) if isinstance(named, str) else named or ())]
    return faults + _faults_of_names(names)


def _is_of_detectron2(loader: Any) -> bool:
    target = loader.get("_target_")
    return getattr(target, "__name__", str(target)).endswith("build_detection_train_loader")


def _faults_of_names(names: Iterable[tuple[str, str]]) -> list[Fault]:
    """Return what is wrong with datasets of detectron2, each with the key that names it."""
    faults: list[Fault] = []
    advice = "put the files there, or set DETECTRON2_DATASETS to the folder that holds them"
    for key, name in names:
        if name not in DatasetCatalog.list():
            allowed = "a dataset that detectron2 knows"
            faults.append(Fault(key, name, allowed, "correct the name, or register it"))
            continue
        metadata = MetadataCatalog.get(name)
        paths = [metadata.get(part) for part in ("json_file", "image_root")]
        faults += [
            Fault(f"dataset {name}", path, "files that exist", advice)
            for path in paths
            if path and "://" not in path and not Path(path).exists()
        ]
    return faults
