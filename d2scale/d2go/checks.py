"""What can be refused under d2go before it starts ranks, and so before it writes anything."""

from __future__ import annotations

from typing import Any

from d2scale.config.projects import entry_points
from d2scale.d2go.command_line import Command
from d2scale.d2go.memory import ENGINE
from d2scale.d2go.run_step import can_take_steps
from d2scale.detectron2.checks import dataset_faults, model_faults, weights_faults
from d2scale.detectron2.memory import check_memory
from d2scale.detectron2.scaling import refuse_unplannable
from d2scale.errors import ConfigError
from d2scale.planning.methods import method_faults, method_of
from d2scale.planning.schedule import follows_gain, schedule_faults
from d2scale.planning.virtual_ranks import ModelFacts

# Functions that register a project's models with detectron2.
MODELS = "d2scale.detectron2"


def register_models() -> None:
    """Let detectron2 know the models of the installed projects."""
    for entry in entry_points(group=MODELS):
        entry.load()()


def check_names(cfg: Any, command: Command) -> None:
    """Refuse models and datasets that are not registered, and weights that are not there.

    Only for a runner that registers nothing of its own on the ranks.

    Raises:
        ConfigError: with all faults.
    """
    register_models()
    faults = model_faults(cfg)
    # d2go registers dynamic ones on the ranks.
    if not cfg.D2GO_DATA.DATASETS.DYNAMIC_DATASETS:
        faults += dataset_faults(cfg, eval_only=not command.trains)
    if not command.resumes:
        faults += weights_faults(cfg.MODEL.WEIGHTS)
    if faults:
        raise ConfigError(faults)


def check_recipe(cfg: Any, world_size: int) -> None:
    """Refuse a recipe that cannot be planned for so many ranks, whatever its memory.

    Raises:
        ConfigError: with all faults.
    """
    methods = cfg.SOLVER.AUTO_SCALING_METHODS
    if faults := [*method_faults(methods), *schedule_faults(cfg)]:
        raise ConfigError(faults)
    check_memory(cfg, ENGINE)
    refuse_unplannable(
        cfg,
        world_size,
        method_of(methods),
        ENGINE,
        ModelFacts.of_recipe(cfg),
        takes_steps=follows_gain(cfg) or can_take_steps(cfg),
    )
