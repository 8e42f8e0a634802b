"""``d2scale demo``: plan, train and compare in small."""

from __future__ import annotations

import argparse

from d2scale.commands.common import Commands, add_command


def add_parser(commands: Commands) -> None:
    """Add ``d2scale demo``."""
    text = "plan, train and compare the published experiments and the gain rule in small"
    parser = add_command(commands, "demo", text, run)
    parser.add_argument("--output-dir", default="demo", metavar="DIR", help="run folders (demo)")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale demo``."""
    from meta_fcos.demo import run_demo

    for part in run_demo(arguments.output_dir):
        print(part, flush=True)
    return 0
