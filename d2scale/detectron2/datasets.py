"""The class splits of COCO, and a config's own datasets, registered with detectron2."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from omegaconf import OmegaConf

from d2scale.coco.catalog import ROOT_VARIABLE, DatasetSpec, dataset_names, dataset_spec
from d2scale.config.own_datasets import file_digests
from d2scale.detectron2.own_datasets import register_own_datasets
from d2scale.errors import DataError, Fault
from d2scale.run_folder.files import write_atomically


def register_datasets(cfg: Any) -> None:
    """Register what ``cfg`` brings along, and what ``DATASETS`` names and only d2scale knows.

    detectron2's evaluator takes the classes from the annotation file. So a file with the split's
    classes alone is written to ``OUTPUT_DIR/datasets``.

    Raises:
        DataError: if a dataset's files are not there.
    """
    register_own_datasets(cfg)
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    for name in dict.fromkeys(names):
        if name in DatasetCatalog.list() or name not in dataset_names():
            continue
        spec = dataset_spec(name)
        target = Path(cfg.OUTPUT_DIR, "datasets", f"{name}.json")
        write_class_split(name, spec, target)
        register_coco_instances(name, {}, str(target), str(spec.image_root))


def annotation_digests(cfg: Any) -> dict[str, str]:
    """Return digests of the annotation files of a config's or LazyConfig's datasets.

    Of those that their registration does not name nothing is known.
    """
    own, files = dataset_names(cfg), {}
    # In one order on all ranks, which tell the first that differs.
    for name in sorted(_names_in(cfg)):
        if name in DatasetCatalog.list():
            if json_file := MetadataCatalog.get(name).get("json_file"):
                files[name] = Path(json_file)
        elif name in own:
            files[name] = dataset_spec(name, cfg=cfg).json_file
    return file_digests(files)


def _names_in(cfg: Any) -> set[str]:
    if "DATASETS" in cfg:
        return {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    named = [
        OmegaConf.select(cfg, f"dataloader.{part}.dataset.names") or ()
        for part in ("train", "test")
    ]
    return {name for names in named for name in ((names,) if isinstance(names, str) else names)}


def write_class_split(name: str, spec: DatasetSpec, target: Path) -> None:
    """Write the annotations of ``spec`` to ``target``, cut to its classes; all images stay.

    Raises:
        DataError: if the annotation file or the image folder is not there.
    """
    for path in (spec.json_file, spec.image_root):
        if not path.exists():
            advice = f"put COCO there, or set {ROOT_VARIABLE} to the folder that holds coco/"
            raise DataError([Fault(f"dataset {name}", str(path), "files that exist", advice)])
    content = json.loads(spec.json_file.read_bytes())
    kept: Collection[int] = spec.category_ids or {entry["id"] for entry in content["categories"]}
    content["categories"] = [entry for entry in content["categories"] if entry["id"] in kept]
    content["annotations"] = [
        entry for entry in content["annotations"] if entry["category_id"] in kept
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    # Every rank writes the same content; no rank may read half a file.
    write_atomically(target, json.dumps(content))
