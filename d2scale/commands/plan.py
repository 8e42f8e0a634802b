"""``d2scale plan``: show how a recipe runs on other GPUs. Without torch."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2scale.commands.common import Commands, add_command, add_recipe, emit
from d2scale.errors import ConfigError, Fault

if TYPE_CHECKING:
    from d2scale.planning.hardware import Hardware
    from d2scale.planning.plan import Plan
    from d2scale.run_folder.measurements import RecipeNoise

_EPILOG = """\
example:
  $ d2scale plan d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml --gpus 1 --method per_gpu
  | config key     |   old value |   new value |
  | SOLVER.BASE_LR |        0.01 |  0.00015625 |
  ...

by the noise that a run of the recipe has measured:
  $ d2scale plan recipe.yaml --method max_memory --ims-per-gpu 8 --noise output/recipe
  ...
  optimizer steps:       30 to 60, about 49 expected
"""


def add_parser(commands: Commands) -> None:
    """Add ``d2scale plan``."""
    text = "show how a recipe runs on other GPUs"
    parser = add_command(commands, "plan", text, run, epilog=_EPILOG, takes_opts=True)
    add_recipe(parser)
    add = parser.add_argument
    add("--gpus", type=int, default=1, metavar="N", help="GPUs to run on (1)")
    add("--gpu-memory-gib", type=float, metavar="G", help="memory of one GPU")
    add("--method", help="per_gpu, keep_total or max_memory")
    add("--lr-rule", help="auto, linear, sqrt, none or gain")
    add("--ims-per-gpu", type=int, metavar="M", help="images in one forward")
    add("--profile", metavar="FILE", help="memory profile")
    help_text = "a run, or what d2scale advise wrote as JSON, to expect so many steps by its noise"
    add("--noise", metavar="RUN", help=help_text)
    help_text = "list float32, AMP, activation checkpointing and both, instead of one plan"
    add("--explore", action="store_true", help=help_text)
    add("--format", choices=("table", "json", "yaml"), default="table")
    add("-o", "--output", metavar="FILE", help="write there, not to the terminal")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale plan``."""
    from d2scale.config.upstream import is_lazy_config

    if is_lazy_config(arguments.config):
        return _run_lazy(arguments)
    from d2scale.coco.class_count import counted_classes
    from d2scale.config.loading import flatten, load_recipe

    cfg, settings = load_recipe(arguments.config, arguments.opts)
    # In settings the words of the command line are text; of the model's keys cfg has none.
    counted = counted_classes({**settings, **dict(flatten(cfg))})
    _print_plan(arguments, cfg, {**settings, **counted})
    return 0


def _run_lazy(arguments: argparse.Namespace) -> int:
    from d2scale.detectron2.lazy_config import lazy_names, load_lazy_config, read_lazy_recipe

    if arguments.format == "yaml":
        advice = "use table, and give its changes to detectron2 as key=value"
        raise ConfigError([Fault("--format", "yaml", "table or json with a LazyConfig", advice)])
    cfg, settings = read_lazy_recipe(load_lazy_config(arguments.config, arguments.opts))
    with lazy_names():
        _print_plan(arguments, cfg, settings)
    return 0


def _print_plan(arguments: argparse.Namespace, cfg: Any, settings: Mapping[str, Any]) -> None:
    from d2scale.planning.hardware import Hardware

    noise = _read_noise(arguments, cfg)
    hardware = Hardware.from_cfg(
        cfg,
        arguments.gpus,
        budget_gib=arguments.gpu_memory_gib,
        profile_path=arguments.profile,
        ims_per_gpu=arguments.ims_per_gpu,
        settings=settings,
        engine=None,  # that of the profile
    )
    if arguments.explore:
        text = _choices(arguments, cfg, hardware)
    else:
        text = _plan(arguments, cfg, settings, hardware, noise)
    emit(text.rstrip("\n") + "\n", arguments.output)


def _choices(arguments: argparse.Namespace, cfg: Any, hardware: Hardware) -> str:
    from d2scale.planning.explore import choices_json, choices_table, explore

    choices = explore(cfg, hardware, method=arguments.method, lr_rule=arguments.lr_rule)
    return choices_json(choices) if arguments.format == "json" else choices_table(choices)


def _plan(
    arguments: argparse.Namespace,
    cfg: Any,
    settings: Mapping[str, Any],
    hardware: Hardware,
    noise: RecipeNoise | None,
) -> str:
    from d2scale.config.loading import resolve_config_path
    from d2scale.config.upstream import is_lazy_config
    from d2scale.planning.formats import plan_table, plan_yaml
    from d2scale.planning.plan import make_plan
    from d2scale.planning.virtual_ranks import ModelFacts

    # YAML is for engines that d2scale does not drive: they cannot follow the gain rule.
    takes_steps = arguments.format != "yaml"
    asked = {"method": arguments.method, "lr_rule": arguments.lr_rule}
    model = ModelFacts.of_recipe(cfg, settings)
    plan = make_plan(cfg, hardware, **asked, takes_steps=takes_steps, model=model)
    _tell_of_uneven_split(arguments.config, plan, cfg)
    if noise is not None:
        plan = plan.with_noise(noise.points)
        if plan.expected_steps is None:
            print(f"note: --noise tells nothing of the rule {plan.lr_rule}", file=sys.stderr)
    if arguments.format == "yaml":
        folder = os.path.dirname(os.path.abspath(arguments.output or "plan.yaml"))
        recipe = os.path.abspath(resolve_config_path(arguments.config))
        return plan_yaml(plan, recipe, settings, folder)
    if arguments.format == "json":
        return json.dumps(plan.to_json(), indent=2)
    if is_lazy_config(arguments.config):
        from d2scale.detectron2.lazy_config import in_lazy_names

        plan = in_lazy_names(plan)
    return plan_table(plan)


def _tell_of_uneven_split(config: str, plan: Plan, cfg: Any) -> None:
    """Print where the engine that would train the recipe refuses the plan's split."""
    from d2scale.commands.engines import choose_engine
    from d2scale.config.upstream import is_lazy_config
    from d2scale.detectron2.lazy_config import lazy_names
    from d2scale.planning.plan import refuse_uneven_split

    engine, _ = choose_engine(config)
    if engine == "default":
        return
    try:
        with lazy_names() if is_lazy_config(config) else nullcontext():
            refuse_uneven_split(plan, cfg)
    except ConfigError as error:
        print(f"note: engine {engine} refuses to train this: {error}", file=sys.stderr)


def _read_noise(arguments: argparse.Namespace, cfg: Any) -> RecipeNoise | None:
    """Return the noise that the user names; ConfigError if it is of another recipe than ``cfg``."""
    from d2scale.run_folder.measurements import read_noise, recipe_to_compare

    if arguments.noise is None:
        return None
    if arguments.explore:
        advice = "leave one of them out: no training by the gain rule is planned there"
        raise ConfigError([Fault("--noise", arguments.noise, "without --explore", advice)])
    noise = read_noise(Path(arguments.noise), "--noise")
    noise.refuse_other_recipe(recipe_to_compare(cfg, arguments.config))
    return noise
