"""``d2scale visualize``: draw what a checkpoint detects."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from d2scale.commands.common import Commands, add_command
from d2scale.errors import printable

_EPILOG = """\
examples, a few test images with the ground truth on the left, and images of one's own:
  $ d2scale visualize output/small
  $ d2scale visualize output/small/model_0000149.pth --input photos/ --score-threshold 0.5

example, aerial photographs, in tiles as large as the images of the training:
  $ d2scale visualize output/small --input aerial/ --tile 800 --overlap 0.2
"""


def add_parser(commands: Commands) -> None:
    """Add ``d2scale visualize``."""
    text = "draw what a checkpoint detects"
    parser = add_command(commands, "visualize", text, run, epilog=_EPILOG, takes_opts=True)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run, for its last checkpoint, or a checkpoint file")
    help_text = "an image or a folder of images; may be given several times (some test images)"
    add("--input", action="append", default=[], metavar="PATH", help=help_text)
    add("--config-file", metavar="FILE", help="config of the model (the run's)")
    add("-o", "--output", default="visualized", metavar="DIR", help="pictures (visualized)")
    add("--score-threshold", type=float, default=0.3, metavar="S", help="from 0 to 1 (0.3)")
    help_text = "see larger images in tiles with this edge, in pixels (D2SCALE.TILES.SIZE)"
    add("--tile", metavar="N", help=help_text)
    help_text = "of two tiles, as a share of their edge (D2SCALE.TILES.OVERLAP, 0.2)"
    add("--overlap", metavar="S", help=help_text)


def _tile_settings(arguments: argparse.Namespace) -> list[str]:
    """Return the options of tiles as ``KEY VALUE`` pairs."""
    options = {"SIZE": arguments.tile, "OVERLAP": arguments.overlap}
    given = {f"D2SCALE.TILES.{name}": value for name, value in options.items() if value is not None}
    return [word for pair in given.items() for word in pair]


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale visualize``."""
    from d2scale.report.visualize import visualize

    drawn = visualize(
        Path(arguments.run),
        Path(arguments.output),
        inputs=[Path(path) for path in arguments.input],
        config_file=arguments.config_file,
        opts=[*arguments.opts, *_tile_settings(arguments)],
        score_threshold=arguments.score_threshold,
    )
    for note in drawn.notes:
        print(printable(note), file=sys.stderr)
    for path in drawn.files:
        print(path)
    return 0
