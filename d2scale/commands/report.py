"""``d2scale report``: compare runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from d2scale.commands.common import Commands, add_command
from d2scale.errors import printable

_EPILOG = """\
example:
  $ d2scale report output/baseline output/same-batch --published -o report.html
  report.html
  report.md
  report_files: 22 pictures
"""


def add_parser(commands: Commands) -> None:
    """Add ``d2scale report``."""
    text = "compare runs: settings, results, curves, time and memory"
    parser = add_command(commands, "report", text, run, epilog=_EPILOG)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a d2scale, detectron2 or d2go run")
    add("--published", action="store_true", help="compare with the published runs as well")
    add("-o", "--output", default="report.html", metavar="FILE", help="the page (report.html)")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale report``."""
    from d2scale.report import write_report

    folders = [Path(folder) for folder in arguments.runs]
    files = write_report(folders, Path(arguments.output), published=arguments.published)
    for note in files.notes:
        print(f"note: {printable(note)}", file=sys.stderr)
    print(files.html)
    print(files.markdown)
    if files.pictures:
        print(f"{files.pictures[0].parent}: {len(files.pictures)} pictures")
    return 0
