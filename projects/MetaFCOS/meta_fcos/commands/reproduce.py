"""``d2scale reproduce``: the published comparison on this machine."""

from __future__ import annotations

import argparse
import sys

from d2scale.commands.common import Commands, add_command

_EPILOG = """\
Called again after an interruption, it goes on where it stopped. projects/MetaFCOS/README.md
is its guide.

example, a tenth of the published length:
  $ d2scale reproduce --images-seen 48000 --output-dir output/reproduction
"""


def add_parser(commands: Commands) -> None:
    """Add ``d2scale reproduce``."""
    text = "run the three published experiments and report on them"
    parser = add_command(commands, "reproduce", text, run, epilog=_EPILOG)
    add = parser.add_argument
    help_text = "as published, or in small for a CPU (full where there is a GPU)"
    add("--form", choices=("full", "small"), help=help_text)
    help_text = "cut each training to N images, its schedule in proportion (the recipe's length)"
    add("--images-seen", type=int, metavar="N", help=help_text)
    help_text = "for experiments 1 and 3, published on two; one runs them too (two, if there are)"
    names = ("--num-gpus", "--num-processes")
    add(*names, dest="num_gpus", type=int, metavar="N", help=help_text)
    help_text = "experiments: 1, 2, 3, or gain, the batch of 3 by the gain rule (1,2,3)"
    add("--only", metavar="1,gain", help=help_text)
    help_text = (
        "experiment 3 as published, rate and length as if the batch had doubled, or by its "
        "ratio of 30/16 (published); small doubles"
    )
    add("--method3", choices=("published", "exact"), default="published", help=help_text)
    add("--plan-only", action="store_true", help="show the plan and stop")
    help_text = "run folders and report (output/reproduction)"
    add("--output-dir", default="output/reproduction", metavar="DIR", help=help_text)


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale reproduce``."""
    from meta_fcos.reproduction.prepare import ReproductionOptions
    from meta_fcos.reproduction.reproduction import reproduce

    options = ReproductionOptions(
        output_dir=arguments.output_dir,
        form=arguments.form,
        images_seen=arguments.images_seen,
        num_gpus=arguments.num_gpus,
        only=arguments.only,
        third_method=arguments.method3,
    )
    try:
        for part in reproduce(options, only_plan=arguments.plan_only):
            print(part, flush=True)
    except KeyboardInterrupt:
        print("The same command goes on where this one stopped.", file=sys.stderr)
        raise
    return 0
