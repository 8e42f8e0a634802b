"""detectron2's DefaultTrainer with d2scale's steps: a mixin for anyone's, and one for recipes.

In a training script of one's own::

    from d2scale.detectron2.trainer import ScaledTrainer

    class Trainer(ScaledTrainer, MyTrainer):  # MyTrainer is derived from DefaultTrainer
        pass
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from d2scale.config.keys import get_key
from d2scale.detectron2.data.loader import with_even_batch
from d2scale.detectron2.data.patient import LOADER_SECONDS, patient
from d2scale.detectron2.data.readable import tell_unreadable_images
from d2scale.detectron2.private_upstream import without_wrapper
from d2scale.detectron2.training import Scaling
from d2scale.errors import ConfigError, Fault
from d2scale.run_folder.files import INFERENCE_FOLDER
from d2scale.step import ranks


class ScaledTrainer:
    """A mixin, to stand before a DefaultTrainer: it plans the config for the ranks of now.

    Args:
        cfg: the recipe's, or a :class:`Scaling` of it. ``trainer.cfg`` is the one planned.
    """

    def __init__(self, cfg: Any) -> None:
        self.scaling = cfg if isinstance(cfg, Scaling) else Scaling(cfg)
        with without_wrapper():
            super().__init__(self.scaling.cfg)  # type: ignore[call-arg]
        self.scaling.take_steps(self, self.checkpointer)  # type: ignore[attr-defined]

    @classmethod
    def build_train_loader(cls, cfg: Any) -> Any:
        # Its batches are made anew, so it may be of any size that detectron2 builds.
        return super().build_train_loader(  # type: ignore[misc]
            with_even_batch(cfg, ranks.world_size())
        )


class RecipeTrainer(ScaledTrainer, DefaultTrainer):
    """Trains a recipe of detectron2, and evaluates it as detectron2's ``train_net.py`` does."""

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> DatasetEvaluator:
        """Return what evaluates a dataset, by detectron2's name for its kind."""
        return build_evaluator(dataset_name, str(Path(cfg.OUTPUT_DIR, INFERENCE_FOLDER)))

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """Return detectron2's loader of a dataset, which tells of images that cannot be read."""
        loader = tell_unreadable_images(super().build_test_loader(cfg, dataset_name))
        return patient(loader, get_key(cfg, "D2SCALE.LOADER_TIMEOUT_SECONDS", LOADER_SECONDS))


def build_evaluator(name: str, folder: str) -> DatasetEvaluator:
    """Return the evaluators of a dataset, which write to ``folder``.

    Raises ConfigError for a dataset that detectron2's own training would not evaluate either.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    evaluators: list[DatasetEvaluator] = []
    if kind in ("sem_seg", "coco_panoptic_seg"):
        evaluators.append(SemSegEvaluator(name, distributed=True, output_dir=folder))
    if kind in ("coco", "coco_panoptic_seg"):
        evaluators.append(COCOEvaluator(name, output_dir=folder))
    if kind == "coco_panoptic_seg":
        evaluators.append(COCOPanopticEvaluator(name, folder))
    if kind in _EVALUATORS:
        evaluators.append(_EVALUATORS[kind](name))
    if kind == "lvis":
        evaluators.append(LVISEvaluator(name, output_dir=folder))
    if not evaluators:
        allowed = "a dataset whose metadata have an evaluator_type of detectron2"
        raise ConfigError([Fault("DATASETS.TEST", name, allowed, "leave it out")])
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


_EVALUATORS = {
    "cityscapes_instance": CityscapesInstanceEvaluator,
    "cityscapes_sem_seg": CityscapesSemSegEvaluator,
    "pascal_voc": PascalVOCDetectionEvaluator,
}
