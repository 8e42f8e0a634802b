"""``d2scale plan``: show how a recipe runs on other GPUs. Without torch."""

from __future__ import annotations

import argparse
import json
import os

from d2scale.commands.common import Commands, add_command, add_recipe, emit

_EPILOG = """\
example:
  $ d2scale plan d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml --gpus 1 --method per_gpu
  | config key     |   old value |   new value |
  | SOLVER.BASE_LR |        0.01 |  0.00015625 |
  ...
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
    help_text = "list float32, AMP, activation checkpointing and both, instead of one plan"
    add("--explore", action="store_true", help=help_text)
    add("--format", choices=("table", "json", "yaml"), default="table")
    add("-o", "--output", metavar="FILE", help="write there, not to the terminal")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale plan``."""
    from d2scale.config.loading import load_recipe, resolve_config_path
    from d2scale.planning.formats import plan_table, plan_yaml
    from d2scale.planning.hardware import Hardware
    from d2scale.planning.plan import make_plan

    cfg, settings = load_recipe(arguments.config, arguments.opts)
    hardware = Hardware.from_cfg(
        cfg,
        arguments.gpus,
        budget_gib=arguments.gpu_memory_gib,
        profile_path=arguments.profile,
        ims_per_gpu=arguments.ims_per_gpu,
        settings=settings,
    )
    if arguments.explore:
        from d2scale.planning.explore import choices_json, choices_table, explore

        choices = explore(cfg, hardware, method=arguments.method, lr_rule=arguments.lr_rule)
        text = choices_json(choices) if arguments.format == "json" else choices_table(choices)
        emit(text + "\n", arguments.output)
        return 0
    plan = make_plan(cfg, hardware, method=arguments.method, lr_rule=arguments.lr_rule)
    if arguments.format == "yaml":
        folder = os.path.dirname(os.path.abspath(arguments.output or "plan.yaml"))
        recipe = os.path.abspath(resolve_config_path(arguments.config))
        text = plan_yaml(plan, recipe, settings, folder)
    elif arguments.format == "json":
        text = json.dumps(plan.to_json(), indent=2)
    else:
        text = plan_table(plan)
    emit(text.rstrip("\n") + "\n", arguments.output)
    return 0
