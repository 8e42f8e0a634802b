"""``d2scale advise``: which batch reaches the recipe's quality soonest on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from d2scale.commands.common import Commands, add_command, emit

_EPILOG = """\
example, by a run at the recipe's batch and one that fills the memory:
  $ d2scale advise output/baseline output/large-batch
"""


def add_parser(commands: Commands) -> None:
    """Add ``d2scale advise``."""
    text = "say which batch reaches the recipe's quality soonest, by what runs have measured"
    parser = add_command(commands, "advise", text, run, epilog=_EPILOG)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a run")
    add("--format", choices=("table", "json"), default="table")
    add("-o", "--output", metavar="FILE", help="write there, not to the terminal")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale advise``."""
    from d2scale.planning.formats import advice_table
    from d2scale.run_folder.comparison import compare
    from d2scale.run_folder.measurements import read_measurements

    comparison = compare([read_measurements(Path(folder)) for folder in arguments.runs])
    text = advice_table(comparison.advice)
    if arguments.format == "json":
        text = json.dumps(comparison.to_json(), indent=1)
    emit(text + "\n", arguments.output)
    return 0
