"""``d2scale train``: train and evaluate a recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from d2scale.commands.common import Commands, add_command, let_idle_threads_sleep
from d2scale.commands.engines import choose_engine
from d2scale.errors import ConfigError, MissingPackageError
from d2scale.launch.topology import Topology, under_torchrun

_EPILOG = """\
example, two processes on the small form:
  $ d2scale train --config-file d2scale://MetaFCOS/small-cpu.yaml --num-gpus 2 \\
        OUTPUT_DIR output/small

example, a recipe of detectron2's zoo for eight GPUs on one:
  $ d2scale train --config-file \
        detectron2://COCO-Detection/retinanet_R_50_FPN_1x.yaml OUTPUT_DIR output/retinanet
"""


def add_parser(commands: Commands) -> None:
    """Add ``d2scale train``."""
    text = "train and evaluate a recipe"
    parser = add_command(commands, "train", text, run, epilog=_EPILOG, takes_opts=True)
    parser.set_defaults(passes_on=lambda arguments: arguments.engine == "d2go")
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE")
    help_text = "what trains; d2go takes d2go's own options too (auto: by the recipe)"
    add("--engine", choices=("auto", *_ENGINES), default="auto", help=help_text)
    names = ("--num-gpus", "--num-processes")
    help_text = "processes on this machine, one to a GPU (1)"
    add(*names, dest="num_processes", type=int, default=1, metavar="N", help=help_text)
    help_text = "machines, on all of which the same command is started (1)"
    add("--num-machines", type=int, default=1, metavar="N", help=help_text)
    add("--machine-rank", type=int, default=0, metavar="N", help="number of this one, from 0")
    add("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0")
    help_text = "how long machines wait for each other (600)"
    add("--join-timeout", type=float, default=600, metavar="SECONDS", help=help_text)
    help_text = "how long ranks wait for one of them before the run ends (1800)"
    add("--rank-timeout", type=float, default=1800, metavar="SECONDS", help=help_text)
    add("--method", help="per_gpu, keep_total or max_memory")
    add("--lr-rule", help="auto, linear, sqrt, none or gain (D2SCALE.LR_RULE)")
    add("--resume", action="store_true", help="go on from the last checkpoint")
    help_text = "resume with another recipe than the training was started with"
    add("--allow-changed-recipe", action="store_true", help=help_text)
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale train``."""
    engine = arguments.engine
    if engine == "auto":
        engine, reason = choose_engine(arguments.config_file)
        print(f"d2scale: engine {engine}: {reason}", file=sys.stderr)
    _ENGINES[engine](arguments)
    return 0


def _topology(arguments: argparse.Namespace) -> Topology:
    return Topology(
        arguments.num_processes,
        arguments.num_machines,
        arguments.machine_rank,
        arguments.dist_url,
        arguments.join_timeout,
        arguments.rank_timeout,
    )


def _train_by_default_engine(arguments: argparse.Namespace) -> None:
    from d2scale.engine.config import load_cfg

    cfg = load_cfg(arguments.config_file, arguments.opts)
    let_idle_threads_sleep(cfg)
    from d2scale.engine.run import train

    if arguments.lr_rule is not None:
        cfg.D2SCALE.LR_RULE = arguments.lr_rule
    if arguments.allow_changed_recipe:
        cfg.D2SCALE.ALLOW_CHANGED_RECIPE = True
    resume, eval_only = arguments.resume, arguments.eval_only
    topology = _topology(arguments)
    train(cfg, topology, resume=resume, eval_only=eval_only, method=arguments.method)


def _train_by_detectron2(arguments: argparse.Namespace) -> None:
    from d2scale.config.upstream import INSTALL_DETECTRON2

    try:
        from d2scale.detectron2.run import Job, train
    except ModuleNotFoundError as error:
        package = f"{error.name}".partition(".")[0]
        raise MissingPackageError(package, "--engine detectron2", INSTALL_DETECTRON2) from error
    job = Job(
        arguments.config_file,
        (*arguments.opts, *_own_settings(arguments)),
        local_ranks=arguments.num_processes,
        method=arguments.method,
        resume=arguments.resume,
        eval_only=arguments.eval_only,
    )
    train(job, _topology(arguments))


def _own_settings(arguments: argparse.Namespace) -> list[str]:
    """Return d2scale's options as settings of the recipe, in its own form."""
    from d2scale.config.upstream import is_lazy_config

    settings = {} if arguments.lr_rule is None else {"D2SCALE.LR_RULE": arguments.lr_rule}
    if arguments.allow_changed_recipe:
        settings["D2SCALE.ALLOW_CHANGED_RECIPE"] = "True"
    if is_lazy_config(arguments.config_file):
        return [f"{key.lower()}={value}" for key, value in settings.items()]
    return [word for pair in settings.items() for word in pair]


def _train_by_d2go(arguments: argparse.Namespace) -> None:
    """Hand d2go its own arguments: d2scale's say the same in other words."""
    if faults := _topology(arguments).faults():
        raise ConfigError(faults)
    words = [f"--num-processes={arguments.num_processes}"]
    words += [
        f"--num-machines={arguments.num_machines}",
        f"--machine-rank={arguments.machine_rank}",
    ]
    if arguments.dist_url != "auto":
        words.append(f"--dist-url={arguments.dist_url}")
    if under_torchrun():
        words.append("--run-as-worker=True")
    words += ["--resume"] * arguments.resume + ["--eval-only"] * arguments.eval_only
    settings = []
    if arguments.method is not None:
        settings += ["SOLVER.AUTO_SCALING_METHODS", f"('d2scale_{arguments.method}',)"]
    if arguments.lr_rule is not None:
        settings += ["D2SCALE.LR_RULE", arguments.lr_rule]
    if arguments.allow_changed_recipe:
        settings += ["D2SCALE.ALLOW_CHANGED_RECIPE", "True"]
    from d2scale.d2go.start import train

    train(arguments.config_file, [*words, *arguments.opts], settings)


_ENGINES: dict[str, Callable[[argparse.Namespace], None]] = {
    "default": _train_by_default_engine,
    "detectron2": _train_by_detectron2,
    "d2go": _train_by_d2go,
}
