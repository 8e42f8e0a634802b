"""What detectron2 and d2go need of a dataset and d2scale's own engine does not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from d2scale.coco.catalog import DatasetSpec
from d2scale.coco.class_count import class_count_faults
from d2scale.config.class_count import class_count_key
from d2scale.config.keys import get_key
from d2scale.config.own_datasets import JSON_FILES
from d2scale.config.upstream import CLASS_COUNT_KEYS, USUAL_CLASSES
from d2scale.errors import Fault

# What pycocotools reads of an annotation, besides what any dataset has.
_FOR_EVALUATION = ("area", "iscrowd")


def evaluation_faults(spec: DatasetSpec) -> Iterator[Fault]:
    """Yield what keeps pycocotools, and with it detectron2, from evaluating on a dataset."""
    try:
        annotations = json.loads(spec.json_file.read_bytes())["annotations"]
        lacking = [name for name in _FOR_EVALUATION if None in {a.get(name) for a in annotations}]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        reason = f"check the file ({type(error).__name__}: {error})"
        yield Fault(JSON_FILES, str(spec.json_file), "annotations in COCO's format", reason)
        return
    if lacking:
        allowed = "for evaluation annotations with area (square pixels) and iscrowd (0)"
        advice = f"add {' and '.join(lacking)}, or leave the dataset out of DATASETS.TEST"
        yield Fault(JSON_FILES, str(spec.json_file), allowed, advice)


def model_class_faults(cfg: Any, settings: Mapping[str, Any] | None = None) -> list[Fault]:
    """Return where a model has another number of classes than its datasets.

    ``settings`` are a recipe's own, by dotted key, where ``cfg`` may not know them.
    """
    model = cfg.MODEL.META_ARCHITECTURE
    key = class_count_key(cfg) or CLASS_COUNT_KEYS.get(model)
    if key is None:
        return []
    number = (settings or {}).get(key, get_key(cfg, key, USUAL_CLASSES))
    # 0 follows the dataset.
    return class_count_faults(cfg, key, number, advice="correct it") if number else []
