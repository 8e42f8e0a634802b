"""``d2scale memory``: predict or measure the device memory that training needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from d2scale.commands.common import Commands, add_command, add_recipe, emit
from d2scale.errors import ConfigError, Fault, MissingPackageError

if TYPE_CHECKING:
    from d2scale.planning.memory_profile import MemoryProfile

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
    help_text = "what would train (auto: by the recipe)"
    add("--engine", choices=("auto", *_ENGINES), default="auto", help=help_text)
    help_text = "with cpu and the default engine: also AMP, activation checkpointing and both"
    add("--explore", action="store_true", help=help_text)
    add("-o", "--output", metavar="FILE", help="write the memory profile there")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale memory``."""
    from d2scale.commands.engines import choose_engine
    from d2scale.planning.formats import profiles_table
    from d2scale.planning.memory_profile import dump_profiles

    engine = arguments.engine
    if engine == "auto":
        engine, reason = choose_engine(arguments.config)
        if engine != "default":
            print(f"d2scale: engine {engine}: {reason}", file=sys.stderr)
    if engine not in _ENGINES:
        advice = "train it with d2scale's Runner, whose max_memory measures or predicts by itself"
        raise ConfigError([Fault("--engine", engine, ", ".join(_ENGINES), advice)])
    profiles, fraction = _ENGINES[engine](arguments)
    if arguments.output is not None:
        emit(dump_profiles(profiles), arguments.output)
    print(profiles_table(profiles, fraction))
    return 0


def _by_default_engine(arguments: argparse.Namespace) -> tuple[Sequence[MemoryProfile], float]:
    from d2scale.engine.config import load_cfg
    from d2scale.engine.memory import make_profiles

    cfg = load_cfg(arguments.config, arguments.opts)
    profiles = make_profiles(cfg, arguments.device, explore=arguments.explore)
    return profiles, cfg.D2SCALE.MEMORY.FRACTION


def _by_detectron2(arguments: argparse.Namespace) -> tuple[Sequence[MemoryProfile], float]:
    from d2scale.config.upstream import INSTALL_DETECTRON2

    try:
        from d2scale.detectron2.plain_memory import make_profile
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("detectron2", "omegaconf"):
            raise
        raise MissingPackageError(package, "this recipe", INSTALL_DETECTRON2) from error
    if arguments.explore:
        allowed, advice = "with the default engine", "ask for one choice: SOLVER.AMP.ENABLED True"
        raise ConfigError([Fault("--explore", True, allowed, advice)])
    profile, fraction = make_profile(arguments.config, arguments.opts, arguments.device)
    return (profile,), fraction


_ENGINES = {"default": _by_default_engine, "detectron2": _by_detectron2}
