"""``d2scale advise``: which batch reaches the recipe's quality soonest on this machine."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from d2scale.commands.common import Commands, add_command, emit, let_idle_threads_sleep
from d2scale.errors import ConfigError, Fault

if TYPE_CHECKING:
    from d2scale.run_folder.measurements import Measurements

_EPILOG = """\
A run is worth most if it followed the gain rule (d2scale train --lr-rule gain): its images are
those that it really needed. A config alone measures its first steps here, and writes nothing.

examples, two short runs of a recipe of 4 images on two CPU cores, and its config:
  $ d2scale advise output/recipe output/double
  | images per GPU   | GPUs   | total batch   | setting   | images/s   | efficiency   | ...
  | 2                | 1      | 4             | float32   | 8.511      | 1.00         | ...
  | 8                | 1      | 8             | float32   | 12.05      | 0.74         | ...

  best: 8 images a step (8 per GPU, GPUs: 1, float32)
  why: 8 images a step save 5 % against the recipe's 4: they show 42 % more images a second and
  need 37 % more images; the median noise scale, 9 images, lies above all measured batches, so a
  still larger one may save more
  ...
  $ d2scale advise recipe.yaml --minutes 5 --format json -o advice.json
  $ d2scale plan recipe.yaml --method max_memory --ims-per-gpu 8 --noise advice.json
"""
_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)*")


def add_parser(commands: Commands) -> None:
    """Add ``d2scale advise``."""
    text = "say which batch reaches the recipe's quality soonest on this machine"
    parser = add_command(commands, "advise", text, run, epilog=_EPILOG, takes_opts=True)
    add = parser.add_argument
    help_text = (
        "folders of runs, for what they have measured; or a config, to measure here; or both"
    )
    add("sources", nargs="+", metavar="RUN|CONFIG", help=help_text)
    help_text = "first steps of the config that are trained for their noise (100)"
    add("--steps", type=int, default=100, metavar="N", help=help_text)
    help_text = "with a config: batches that take longer are left out (10)"
    add("--minutes", type=float, default=10.0, metavar="T", help=help_text)
    help_text = "largest batch to time (what fits; on a CPU four times the recipe's)"
    add("--max-ims-per-gpu", type=int, default=0, metavar="M", help=help_text)
    help_text = "time the config with and without AMP and activation checkpointing"
    add("--variants", action="store_true", help=help_text)
    add("--format", choices=("table", "json"), default="table")
    add("-o", "--output", metavar="FILE", help="write there, not to the terminal")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale advise``."""
    from d2scale.planning.formats import advice_table
    from d2scale.run_folder.comparison import compare
    from d2scale.run_folder.measurements import read_measurements

    folders, config, opts = _sort(arguments.sources, arguments.opts)
    runs = [read_measurements(folder) for folder in folders]
    here = None if config is None else _measure(config, opts, arguments, runs)
    comparison = compare(runs, here)
    text = advice_table(comparison.advice)
    if arguments.format == "json":
        text = json.dumps(comparison.to_json(), indent=1)
    emit(text + "\n", arguments.output)
    return 0


def _sort(words: list[str], opts: list[str]) -> tuple[list[Path], str | None, list[str]]:
    """Return the folders of runs, the config if there is one, and the KEY VALUE pairs."""
    # argparse takes pairs that follow at once for sources.
    are_keys = [bool(_KEY.fullmatch(word)) and not Path(word).exists() for word in words]
    end = [*are_keys, True].index(True)
    sources, opts = words[:end], words[end:] + opts
    configs = [word for word in sources if "://" in word or Path(word).suffix in (".yaml", ".yml")]
    if len(configs) > 1:
        allowed = "one config, and folders of runs"
        raise ConfigError([Fault("CONFIG", ", ".join(configs), allowed, "leave the others out")])
    if opts and not configs:
        advice = "leave it out, or give the config too"
        raise ConfigError([Fault("KEY VALUE", " ".join(opts), "with a config", advice)])
    folders = [Path(word) for word in sources if word not in configs]
    return folders, configs[0] if configs else None, opts


def _measure(
    config: str, opts: list[str], arguments: argparse.Namespace, runs: list[Measurements]
) -> Measurements:
    """Measure the config here: its speeds, and its noise if no run has it."""
    from d2scale.engine.config import load_cfg

    cfg = load_cfg(config, opts)
    let_idle_threads_sleep(cfg)
    from d2scale.benchmark.first_steps import FirstStepsOptions, measure_first_steps
    from d2scale.run_folder.measurements import recipe_to_compare

    # Before it takes minutes.
    recipe = recipe_to_compare(cfg, config)
    for run in runs:
        recipe.refuse_other_recipe(run.noise)
    if arguments.output and not Path(arguments.output).absolute().parent.is_dir():
        allowed = "a file in a folder that is there"
        raise ConfigError([Fault("--output", arguments.output, allowed, "make the folder")])

    options = FirstStepsOptions(
        steps=arguments.steps,
        measures_noise=not any(run.noise.points for run in runs),
        minutes=arguments.minutes,
        max_ims_per_gpu=arguments.max_ims_per_gpu,
        variants=arguments.variants,
    )
    print(f"measuring here (--minutes {arguments.minutes:g} at most)", file=sys.stderr)
    return measure_first_steps(cfg, options)
