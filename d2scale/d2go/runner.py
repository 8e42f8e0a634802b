"""``d2go.train_net --runner d2scale.Runner``: d2go's own training, on the hardware at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from d2go.runner import GeneralizedRCNNRunner
from detectron2.engine.hooks import IterationTimer
from detectron2.utils.logger import setup_logger

from d2scale.coco.class_count import counted_classes
from d2scale.config.defaults import add_d2scale_config, add_project_configs
from d2scale.config.keys import set_key
from d2scale.config.own_datasets import make_paths_absolute
from d2scale.config.projects import entry_points
from d2scale.d2go.checks import MODELS, check_names, check_recipe, register_models
from d2scale.d2go.command_line import this_command
from d2scale.d2go.config import CfgNode, for_d2go_alone
from d2scale.d2go.environment import refuse_missing_quantization
from d2scale.d2go.memory import ENGINE, D2GoMemory
from d2scale.d2go.run_step import D2GoRunStep, can_take_steps
from d2scale.d2go.scaling_methods import (
    leave_scaling_to_training,
    names_own_method,
    scale_for_training,
)
from d2scale.d2go.start import prepare_parent
from d2scale.detectron2.data.loader import with_even_batch
from d2scale.detectron2.data.patient import patient
from d2scale.detectron2.data.readable import ReadableMapper
from d2scale.detectron2.datasets import register_datasets
from d2scale.detectron2.own_datasets import own_dataset_faults, registered_by_d2go
from d2scale.detectron2.private_upstream import SteadyIterationTimer, bare_model
from d2scale.detectron2.progress import ProgressRecord, resume_by_images
from d2scale.detectron2.scaling import applied_plan, defrosted, facts_of_model, warn_without_effect
from d2scale.detectron2.step_state import (
    STEP_STATE,
    FinalCheckpointHook,
    StateHook,
    StepState,
    build_step_state,
)
from d2scale.detectron2.user_errors import (
    exit_alone_on_user_error,
    exit_on_user_error,
    exit_together_on_user_error,
    faults_of_building,
    let_hooks_exit_on_user_error,
)
from d2scale.errors import ConfigError, Fault, collecting
from d2scale.planning.progress import RECORD, recipe_of
from d2scale.planning.schedule import follows_gain
from d2scale.run_folder.contents import write_plan
from d2scale.run_folder.shortages import let_log_calmly
from d2scale.step import ranks
from d2scale.step.norms import synchronise_norms
from d2scale.step.precision import bfloat16_faults

_WITHOUT_EFFECT = {
    "D2SCALE.EXACT": "the samples of a step depend on the number of processes",
    "D2SCALE.ACTIVATION_CHECKPOINTING": (
        "d2go has its own: MODEL.MODELING_HOOKS ['ActivationCheckpointModelingHook']"
    ),
}
_WITHOUT_EFFECT_ON_EVALUATION = {"D2SCALE.TILES.SIZE": "only the default engine evaluates in tiles"}


class Runner(GeneralizedRCNNRunner):
    """A d2go runner that knows d2scale's config keys, methods, models and datasets.

    ``SOLVER.AUTO_SCALING_METHODS: [d2scale_keep_total]`` (or another method) in a config chooses
    how its training is scaled. The method takes effect on any world size, the recipe's own
    included, and once; evaluation and export scale nothing. A training resumes at the image where
    it stopped, whatever the world size.
    """

    _recipe: dict[str, Any] | None = None
    _record: ProgressRecord | None = None
    _state: StepState | None = None

    @classmethod
    def get_default_cfg(cls) -> CfgNode:
        """Return d2go's defaults with the keys of d2scale and of its projects."""
        cfg = CfgNode.cast_from_other_class(super().get_default_cfg())
        add_d2scale_config(cfg)
        add_project_configs(cfg)
        return cfg

    @classmethod
    def create_shared_context(cls, cfg: Any) -> None:
        """Check the recipe before processes are launched; d2go calls this in their parent."""
        prepare_parent()
        with exit_on_user_error():
            if cfg.QUANTIZATION.PT2E:
                refuse_missing_quantization()
            _prepare_datasets(cfg)
            command = this_command()
            faults: list[Fault] = []
            # A runner of one's own may register more, on the ranks.
            if cls.register is Runner.register:
                with collecting(faults):
                    check_names(cfg, command)
            if names_own_method(cfg) and command.trains:
                with collecting(faults):
                    check_recipe(cfg, command.world_size)
            if faults:
                raise ConfigError(faults)

    def register(self, cfg: Any) -> None:
        """Register what a config may name: datasets and the projects' models."""
        with exit_together_on_user_error():
            _prepare_datasets(cfg)
        with registered_by_d2go(cfg):
            super().register(cfg)
        _log_to_folder(cfg.OUTPUT_DIR)
        warn_without_effect(cfg, _WITHOUT_EFFECT_ON_EVALUATION, ENGINE)
        # d2go registers before it scales the config in place.
        self._recipe = recipe_of(cfg)
        leave_scaling_to_training(cfg)
        with exit_together_on_user_error():
            register_datasets(cfg)
        register_models()

    def build_checkpointer(self, cfg: Any, model: Any, save_dir: str, **kwargs: Any) -> Any:
        """Return d2go's checkpointer; in training it also keeps, and resumes by, a record."""
        if "optimizer" not in kwargs or "scheduler" not in kwargs:
            return super().build_checkpointer(cfg, model, save_dir, **kwargs)
        self._record = record = ProgressRecord(cfg, self._recipe, engine=ENGINE)
        self._state = state = build_step_state(cfg, applied_plan(cfg), bare_model(model))
        own = {RECORD: record, STEP_STATE: state}
        checkpointer = super().build_checkpointer(cfg, model, save_dir, **own, **kwargs)
        resume_by_images(
            checkpointer, record, kwargs["optimizer"], kwargs["scheduler"], cfg.SOLVER.MAX_ITER
        )
        return checkpointer

    def build_model(self, cfg: Any, eval_only: bool = False) -> torch.nn.Module:
        """Build the model that the config names; a config it cannot have is a user's mistake."""
        key = "MODEL.META_ARCHITECTURE"
        building = faults_of_building(key, cfg.MODEL.META_ARCHITECTURE)
        with exit_together_on_user_error(), building:
            return super().build_model(cfg, eval_only)

    @classmethod
    def build_detection_train_loader(
        cls, cfg: Any, *args: Any, mapper: Any = None, **kwargs: Any
    ) -> Any:
        """Build d2go's loader; that of virtual ranks is made of it, whatever its batch size."""
        mapper = ReadableMapper(mapper or cls.get_mapper(cfg, True))
        plan = applied_plan(cfg)
        if plan is not None and plan.virtual_ranks:
            cfg = with_even_batch(cfg, ranks.world_size())
        return super().build_detection_train_loader(cfg, *args, mapper=mapper, **kwargs)

    @classmethod
    def build_detection_test_loader(
        cls, cfg: Any, dataset_name: Any, mapper: Any = None, **kwargs: Any
    ) -> Any:
        """Build d2go's loader, which tells of images that cannot be read."""
        mapper = ReadableMapper(mapper or cls.get_mapper(cfg, False))
        loader = super().build_detection_test_loader(cfg, dataset_name, mapper=mapper, **kwargs)
        return patient(loader, cfg.D2SCALE.LOADER_TIMEOUT_SECONDS)

    def _get_trainer_hooks(
        self,
        cfg: Any,
        model: Any,
        optimizer: Any,
        scheduler: Any,
        periodic_checkpointer: Any,
        trainer: Any,
    ) -> list[Any]:
        """Return d2go's hooks, and those that take the steps and keep their state."""
        hooks = super()._get_trainer_hooks(
            cfg, model, optimizer, scheduler, periodic_checkpointer, trainer
        )
        let_hooks_exit_on_user_error(trainer, Path(cfg.OUTPUT_DIR))
        checkpointer, state = periodic_checkpointer.checkpointer, self._state
        run_step = D2GoRunStep(cfg, checkpointer, self._record, state)
        if follows_gain(cfg):
            timer = SteadyIterationTimer(lambda: run_step.iteration_seconds)
            hooks = [timer if type(hook) is IterationTimer else hook for hook in hooks]
        states = [] if state is None else [StateHook(state, [periodic_checkpointer.period])]
        return [FinalCheckpointHook(checkpointer, state), *states, *hooks, run_step]

    def do_train(self, cfg: Any, model: torch.nn.Module, resume: bool) -> Any:
        """Scale the config, then train as d2go does."""
        with exit_together_on_user_error():
            if faults := bfloat16_faults(cfg):
                raise ConfigError(faults)
            # A rule that was asked for is not replaced: RunStep will refuse what it cannot follow.
            takes_steps = follows_gain(cfg) or can_take_steps(cfg, model)
            memory = D2GoMemory(cfg, self, model)
            facts = facts_of_model(model)
            scale_for_training(cfg, memory, resume=resume, takes_steps=takes_steps, model=facts)
            memory.hold_to_budget()
            plan = applied_plan(cfg)
            if plan is not None and takes_steps:
                synchronise_norms(bare_model(model), plan.sync_bn)
            if plan is not None and ranks.rank() == 0:
                write_plan(Path(cfg.OUTPUT_DIR), plan)
        warn_without_effect(cfg, _WITHOUT_EFFECT, ENGINE)
        with exit_alone_on_user_error(Path(cfg.OUTPUT_DIR)):
            trained = super().do_train(cfg, model, resume)
        theirs, ours = GeneralizedRCNNRunner.get_default_cfg(), self.get_default_cfg()
        return {name: for_d2go_alone(config, theirs, ours) for name, config in trained.items()}

    def do_test(self, cfg: Any, model: torch.nn.Module, train_iter: int | None = None) -> Any:
        """Evaluate as d2go does."""
        with exit_alone_on_user_error(Path(cfg.OUTPUT_DIR)):
            return super().do_test(cfg, model, train_iter=train_iter)


def _prepare_datasets(cfg: Any) -> None:
    """Refuse datasets of ``cfg`` that cannot be; let the count of classes follow them, in place."""
    if faults := own_dataset_faults(cfg):
        raise ConfigError(faults)
    with defrosted(cfg):
        make_paths_absolute(cfg)  # for who reads config.yaml in another folder
        for key, number in counted_classes(cfg).items():
            set_key(cfg, key, number)


def _log_to_folder(folder: str) -> None:
    """Write the log lines of d2scale and its projects to ``log.txt``, beside those of d2go."""
    projects = {entry.module.partition(".")[0] for entry in entry_points(group=MODELS)}
    for package in {"d2scale", *projects}:
        # d2go prints the lines of all packages already.
        setup_logger(
            folder, ranks.rank(), name=package, enable_propagation=True, configure_stdout=False
        )
        let_log_calmly(package)
