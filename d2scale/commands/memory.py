"""``d2scale memory``: tell how much device memory training needs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from d2scale.commands.common import add_command, emit

if TYPE_CHECKING:
    from d2scale.commands.common import Commands

_EPILOG = """\
example, without a GPU:
  $ d2scale memory d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml --device cpu -o profile.json
  $ d2scale plan d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml --method max_memory \\
        --gpu-memory-gib 16 --profile profile.json
"""


def add_parser(commands: Commands) -> None:
    """Add ``d2scale memory``."""
    parser = add_command(
        commands, "memory", "tell how much device memory training needs", _EPILOG, True
    )
    parser.add_argument("config", help="the recipe: a file or d2scale://NAME.yaml")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cpu: predict for a GPU that need not be there; cuda: measure (cpu)",
    )
    parser.add_argument(
        "--explore",
        action="store_true",
        help="with cpu: also AMP, activation checkpointing and both",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the memory profile there")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale memory``."""
    from d2scale.config import load_cfg
    from d2scale.engine.memory.profiling import make_profiles
    from d2scale.planning.memory_profile import dump_profiles
    from d2scale.planning.profile_tables import to_table

    cfg = load_cfg(arguments.config, arguments.opts)
    profiles = make_profiles(cfg, arguments.device, explore=arguments.explore)
    if arguments.output is not None:
        emit(dump_profiles(profiles), arguments.output)
    print(to_table(profiles, cfg.D2SCALE.MEMORY.FRACTION))
    return 0
