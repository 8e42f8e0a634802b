"""A recipe of detectron2, YAML or LazyConfig, planned and trained on the ranks of now.

For a training script of one's own::

    scaling = Scaling(cfg)                          # on every rank, before anything is built of it
    cfg = scaling.cfg
    ...
    scaling.take_steps(trainer, checkpointer)       # before checkpointer.resume_or_load

A subclass of DefaultTrainer needs :class:`d2scale.detectron2.trainer.ScaledTrainer` alone.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase, TrainerBase
from detectron2.engine.hooks import IterationTimer
from fvcore.common.config import CfgNode

from d2scale.config.loading import flatten
from d2scale.detectron2.config import with_d2scale_keys, without_default_keys
from d2scale.detectron2.datasets import annotation_digests
from d2scale.detectron2.lazy_config import apply_plan, lazy_names, read_lazy_recipe
from d2scale.detectron2.memory import TrainingMemory
from d2scale.detectron2.plain_memory import LazyMemory, PlainMemory
from d2scale.detectron2.private_upstream import (
    SteadyIterationTimer,
    insert_hooks,
    join_local_group,
    replace_hook,
    taking_steps,
    without_gradient_buckets,
)
from d2scale.detectron2.progress import ProgressRecord, resume_by_images
from d2scale.detectron2.run_step import RunStep
from d2scale.detectron2.scaling import scale_in_place, warn_without_effect
from d2scale.detectron2.step_state import (
    STEP_STATE,
    FinalCheckpointHook,
    StateHook,
    build_step_state,
)
from d2scale.detectron2.user_errors import exit_together_on_user_error, let_hooks_exit_on_user_error
from d2scale.errors import ConfigError, Fault
from d2scale.launch.comparison import refuse_different_ranks
from d2scale.planning.methods import method_of
from d2scale.planning.progress import RECORD, recipe_of
from d2scale.planning.schedule import follows_gain
from d2scale.planning.virtual_ranks import ModelFacts
from d2scale.run_folder.contents import write_config, write_plan
from d2scale.run_folder.files import make_folder
from d2scale.step import ranks
from d2scale.step.norms import synchronise_norms

logger = logging.getLogger(__name__)

_WITHOUT_EFFECT = {
    "D2SCALE.EXACT": "virtual ranks take the recipe's own steps (D2SCALE.VIRTUAL_RANKS)",
    "D2SCALE.ACTIVATION_CHECKPOINTING": "only the default engine has it",
}


class Scaling:
    """A recipe's plan for the ranks of now, and what a trainer needs to follow it.

    Every rank builds one, in its process group, from the same recipe; mistakes end all of them.

    Args:
        cfg: a config of detectron2, or a LazyConfig; it is not changed.
        method: see :func:`d2scale.planning.plan.make_plan`.

    Attributes:
        cfg: planned, of the same kind.
        plan: how it runs.
    """

    def __init__(self, cfg: Any, method: str | None = None) -> None:
        join_local_group()
        self.is_lazy = not isinstance(cfg, CfgNode)
        names = lazy_names() if self.is_lazy else nullcontext()
        with exit_together_on_user_error(), names:
            settings: dict[str, Any]
            if self.is_lazy:
                planned, settings = read_lazy_recipe(cfg)
            else:
                planned = with_d2scale_keys(cfg)
                settings = dict(flatten(planned))
            self.recipe = self._recipe(planned, settings)
            data = annotation_digests(cfg)
            refuse_different_ranks(settings, data, {"method": method})
            memory: TrainingMemory = PlainMemory(planned)
            if self.is_lazy:
                memory = LazyMemory(cfg, (planned, settings))
            self.plan = scale_in_place(
                planned,
                ranks.world_size(),
                method or method_of(planned.SOLVER.AUTO_SCALING_METHODS),
                memory,
                takes_steps=True,
                model=ModelFacts.of_recipe(planned, settings),
            )
        memory.hold_to_budget()
        warn_without_effect(planned, _WITHOUT_EFFECT, "detectron2")
        self.settings = planned  # by the names of YAML configs, planned
        self.cfg = apply_plan(cfg, self.plan) if self.is_lazy else planned

    def _recipe(self, cfg: Any, settings: dict[str, Any]) -> dict[str, Any]:
        lazy = {k: v for k, v in settings.items() if k.startswith(("model.", "dataloader."))}
        return {**recipe_of(cfg), **(lazy if self.is_lazy else {})}

    def take_steps(self, trainer: TrainerBase, checkpointer: Any) -> None:
        """Let d2scale take the steps of ``trainer`` and keep its progress in its checkpoints.

        To be called once the trainer has its hooks, and before a checkpoint is loaded.

        Args:
            trainer: a SimpleTrainer, an AMPTrainer or a DefaultTrainer.
            checkpointer: the trainer's; it saves and loads ``trainer``.
        """
        cfg, inner = self.settings, taking_steps(trainer)
        with exit_together_on_user_error():
            if obstacle := RunStep.obstacle_of(trainer):
                allowed = "detectron2's SimpleTrainer or AMPTrainer of a plain model"
                advice = "train without it, or without d2scale"
                raise ConfigError([Fault("what takes the steps", obstacle, allowed, advice)])
            inner.model = model = without_gradient_buckets(inner.model)
            synchronise_norms(model, self.plan.sync_bn)
            ranks.broadcast_model(model)
            state = build_step_state(cfg, self.plan, model)
        record = ProgressRecord(cfg, self.recipe)
        checkpointer.add_checkpointable(RECORD, record)
        checkpointer.add_checkpointable(STEP_STATE, state)
        scheduler = getattr(trainer, "scheduler", None)
        resume_by_images(
            checkpointer, record, inner.optimizer, scheduler, cfg.SOLVER.MAX_ITER, trainer
        )
        let_hooks_exit_on_user_error(trainer, Path(cfg.OUTPUT_DIR))
        run_step = RunStep(cfg, checkpointer, record, state)
        insert_hooks(
            trainer,
            [_Facts(self), run_step, FinalCheckpointHook(checkpointer, state), StateHook(state)],
        )
        if follows_gain(cfg):
            timer = SteadyIterationTimer(lambda: run_step.iteration_seconds)
            replace_hook(trainer, IterationTimer, timer)

    def write_facts(self) -> None:
        """Write ``plan.json`` and ``config.yaml``, on rank 0."""
        folder = Path(self.settings.OUTPUT_DIR)
        make_folder(folder)
        write_plan(folder, self.plan)
        if not self.is_lazy:
            write_config(folder, without_default_keys(self.cfg))


class _Facts(HookBase):
    """Writes the plan when the training begins: its checkpoint has been accepted then."""

    def __init__(self, scaling: Scaling) -> None:
        self._scaling = scaling

    def before_train(self) -> None:
        if ranks.rank() == 0:
            self._scaling.write_facts()
