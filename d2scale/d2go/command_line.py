"""What a command of d2go is to do: d2go gives a runner only the config."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from d2scale.launch.topology import number_of_torchrun

# With these begin the names of d2go's scripts and modules that evaluate or export.
_NO_TRAINING = ("d2go.exporter", "exporter", "evaluator")


@dataclass(frozen=True)
class Command:
    """The options of a command that decide what may be refused before it starts its ranks."""

    world_size: int
    trains: bool
    resumes: bool


def this_command() -> Command:
    """Return what the command line of this process asks for, be it d2go's or d2scale's."""
    program, *words = sys.argv
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--num-processes", "--num-gpus", dest="processes", type=int, default=1)
    parser.add_argument("--num-machines", dest="machines", type=int, default=1)
    parser.add_argument("--eval-only", action="store_true")
    parser.add_argument("--resume", action="store_true")
    asked, _ = parser.parse_known_args(words)
    return Command(
        number_of_torchrun("WORLD_SIZE", asked.processes * asked.machines),
        trains=not (asked.eval_only or Path(program).name.startswith(_NO_TRAINING)),
        resumes=asked.resume,
    )
