"""``d2scale memory``: predict or measure the device memory that training needs."""

from __future__ import annotations

import argparse

from d2scale.commands.common import Commands, add_command, add_recipe, emit

_EPILOG = """\
example, without a GPU:
  $ d2scale memory d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml --device cpu -o profile.json
  $ d2scale plan d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml --method max_memory \\
        --gpu-memory-gib 16 --profile profile.json
"""


def add_parser(commands: Commands) -> None:
    """Add ``d2scale memory``."""
    text = "predict or measure the device memory that training needs"
    parser = add_command(commands, "memory", text, run, epilog=_EPILOG, takes_opts=True)
    add_recipe(parser)
    add = parser.add_argument
    help_text = "cpu: predict for a GPU that need not be there; cuda: measure (cpu)"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=help_text)
    help_text = "with cpu: also AMP, activation checkpointing and both"
    add("--explore", action="store_true", help=help_text)
    add("-o", "--output", metavar="FILE", help="write the memory profile there")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale memory``."""
    from d2scale.config import load_cfg
    from d2scale.engine.memory import make_profiles
    from d2scale.planning.formats import profiles_table
    from d2scale.planning.memory_profile import dump_profiles

    cfg = load_cfg(arguments.config, arguments.opts)
    profiles = make_profiles(cfg, arguments.device, explore=arguments.explore)
    if arguments.output is not None:
        emit(dump_profiles(profiles), arguments.output)
    print(profiles_table(profiles, cfg.D2SCALE.MEMORY.FRACTION))
    return 0
