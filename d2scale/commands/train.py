"""``d2scale train``: train and evaluate a recipe."""

from __future__ import annotations

import argparse

from d2scale.commands.common import Commands, add_command, let_idle_threads_sleep

_EPILOG = """\
example, two processes on the small form:
  $ d2scale train --config-file d2scale://MetaFCOS/small-cpu.yaml --num-gpus 2 \\
        OUTPUT_DIR output/small
"""


def add_parser(commands: Commands) -> None:
    """Add ``d2scale train``."""
    text = "train and evaluate a recipe"
    parser = add_command(commands, "train", text, run, epilog=_EPILOG, takes_opts=True)
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE")
    names = ("--num-gpus", "--num-processes")
    help_text = "processes on this machine, one to a GPU (1)"
    add(*names, dest="num_processes", type=int, default=1, metavar="N", help=help_text)
    add("--num-machines", type=int, default=1, metavar="N")
    add("--machine-rank", type=int, default=0, metavar="N")
    add("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0")
    add("--method", help="per_gpu, keep_total or max_memory")
    add("--lr-rule", help="auto, linear, sqrt, none or gain (D2SCALE.LR_RULE)")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    help_text = "resume with another recipe than the training was started with"
    add("--allow-changed-recipe", action="store_true", help=help_text)
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale train``."""
    from d2scale.config import load_cfg

    cfg = load_cfg(arguments.config_file, arguments.opts)
    let_idle_threads_sleep(cfg)
    from d2scale.engine.run import train
    from d2scale.launch.launch import Topology

    if arguments.lr_rule is not None:
        cfg.D2SCALE.LR_RULE = arguments.lr_rule
    if arguments.allow_changed_recipe:
        cfg.D2SCALE.ALLOW_CHANGED_RECIPE = True
    machines = (arguments.num_machines, arguments.machine_rank, arguments.dist_url)
    topology = Topology(arguments.num_processes, *machines)
    resume, eval_only = arguments.resume, arguments.eval_only
    train(cfg, topology, resume=resume, eval_only=eval_only, method=arguments.method)
    return 0
