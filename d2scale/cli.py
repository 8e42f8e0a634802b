"""The ``d2scale`` command. Only this module prints."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from d2scale import __version__
from d2scale.errors import (
    EXIT_STATUS_USER_ERROR,
    ConfigError,
    D2ScaleError,
    Fault,
    MissingPackageError,
)

if TYPE_CHECKING:
    from d2scale.hardware import Hardware

_PLAN_EPILOG = """\
example:
  $ d2scale plan d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml --gpus 1 --method per_gpu
  | config key     |   old value |   new value |
  | SOLVER.BASE_LR |        0.01 |  0.00015625 |
  ...
"""

_MEMORY_EPILOG = """\
example, without a GPU:
  $ d2scale memory d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml --device cpu -o profile.json
  $ d2scale plan d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml --method max_memory \\
        --gpu-memory-gib 16 --profile profile.json
"""

_TRAIN_EPILOG = """\
example, two processes on the small form:
  $ d2scale train --config-file d2scale://MetaFCOS/small-cpu.yaml --num-gpus 2 \\
        OUTPUT_DIR output/small
"""


# What the extra "train" brings: planning works without.
TRAINING_PACKAGES = ("torch", "torchvision", "pycocotools", "tensorboard", "tqdm", "PIL", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 for a user's mistake."""
    arguments = _parse(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except D2ScaleError as error:
        for line in str(error).splitlines():
            print(f"d2scale: error: {line}", file=sys.stderr)
        return EXIT_STATUS_USER_ERROR
    except ModuleNotFoundError as error:
        if error.name not in TRAINING_PACKAGES:
            raise
        print(f"d2scale: error: {_missing(error.name)}", file=sys.stderr)
        return EXIT_STATUS_USER_ERROR
    except KeyboardInterrupt:
        print("d2scale: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe left; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _missing(package: str) -> MissingPackageError:
    return MissingPackageError(package, "this command", "pip install 'd2scale[train]'")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    # argparse cannot take KEY VALUE pairs behind options: they are what it leaves over.
    arguments, arguments_left = parser.parse_known_args(argv)
    wrong = [word for word in arguments_left if word.startswith("--") or not arguments.takes_opts]
    if wrong:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    arguments.opts = arguments_left
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="d2scale", description="Run recipes written for a cluster on the GPUs at hand."
    )
    parser.add_argument("--version", action="version", version=f"d2scale {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_memory(commands)
    _add_train(commands)
    _add_demo(commands)
    doctor = _add_command(commands, "doctor", "show versions, devices, and what can run here")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    epilog: str = "",
    takes_opts: bool = False,
) -> argparse.ArgumentParser:
    description = text[0].upper() + text[1:] + "."
    if takes_opts:
        description += " KEY VALUE pairs at the end override config keys."
    parser = commands.add_parser(
        name,
        help=text,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(takes_opts=takes_opts)
    return parser


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(
        commands, "plan", "show how a recipe runs on other GPUs", _PLAN_EPILOG, True
    )
    parser.add_argument("config", help="the recipe: a file or d2scale://NAME.yaml")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs to run on (1)")
    parser.add_argument("--gpu-memory-gib", type=float, metavar="G", help="memory of one GPU")
    parser.add_argument("--method", help="per_gpu, keep_total or max_memory")
    parser.add_argument("--lr-rule", help="auto, linear, sqrt or none")
    parser.add_argument("--ims-per-gpu", type=int, metavar="M", help="images in one forward")
    parser.add_argument("--profile", metavar="FILE", help="memory profile")
    parser.add_argument(
        "--explore",
        action="store_true",
        help="list float32, AMP, activation checkpointing and both, instead of one plan",
    )
    parser.add_argument("--format", choices=("table", "json", "yaml"), default="table")
    parser.add_argument("-o", "--output", metavar="FILE", help="write there, not to the terminal")
    parser.set_defaults(command=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    from d2scale import plan_formats
    from d2scale.config.loading import load_recipe, resolve_config_path
    from d2scale.plan import Hardware, make_plan

    cfg, settings = load_recipe(arguments.config, arguments.opts)
    hardware = Hardware.from_cfg(
        cfg,
        arguments.gpus,
        budget_gib=arguments.gpu_memory_gib,
        profile_path=arguments.profile,
        ims_per_gpu=arguments.ims_per_gpu,
        settings=settings,
    )
    if arguments.explore:
        return _explore(arguments, cfg, hardware)
    plan = make_plan(cfg, hardware, method=arguments.method, lr_rule=arguments.lr_rule)
    if arguments.format == "yaml":
        folder = os.path.dirname(os.path.abspath(arguments.output or "plan.yaml"))
        recipe = os.path.abspath(resolve_config_path(arguments.config))
        text = plan_formats.to_yaml(plan, recipe, settings, folder)
    elif arguments.format == "json":
        text = plan_formats.to_json(plan)
    else:
        text = plan_formats.to_table(plan)
    _emit(text.rstrip("\n") + "\n", arguments.output)
    return 0


def _explore(arguments: argparse.Namespace, cfg: Any, hardware: Hardware) -> int:
    from d2scale.explore import explore, to_json, to_table

    choices = explore(cfg, hardware, method=arguments.method, lr_rule=arguments.lr_rule)
    text = to_json(choices) if arguments.format == "json" else to_table(choices)
    _emit(text + "\n", arguments.output)
    return 0


def _emit(text: str, path: str | None) -> None:
    """Print ``text``, or put it whole into ``path``."""
    if path is None:
        sys.stdout.write(text)
        return
    folder = os.path.dirname(os.path.abspath(path))
    try:
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".d2scale-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            [Fault("--output", path, "a file that can be written", f"{error.strerror}")]
        ) from error


def _add_memory(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(
        commands, "memory", "tell how much device memory training needs", _MEMORY_EPILOG, True
    )
    parser.add_argument("config", help="the recipe: a file or d2scale://NAME.yaml")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cpu: predict for a GPU that need not be there; cuda: measure (cpu)",
    )
    parser.add_argument(
        "--explore",
        action="store_true",
        help="with cpu: also AMP, activation checkpointing and both",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="write the memory profile there")
    parser.set_defaults(command=_memory)


def _memory(arguments: argparse.Namespace) -> int:
    from d2scale.config import load_cfg
    from d2scale.memory.profile import dump_profiles
    from d2scale.memory.profiling import make_profiles
    from d2scale.memory.tables import to_table

    cfg = load_cfg(arguments.config, arguments.opts)
    profiles = make_profiles(cfg, arguments.device, explore=arguments.explore)
    if arguments.output is not None:
        _emit(dump_profiles(profiles), arguments.output)
    print(to_table(profiles, cfg.D2SCALE.MEMORY.FRACTION))
    return 0


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(commands, "train", "train and evaluate a recipe", _TRAIN_EPILOG, True)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument(
        "--num-gpus",
        "--num-processes",
        dest="num_processes",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, one to a GPU (1)",
    )
    parser.add_argument("--num-machines", type=int, default=1, metavar="N")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="N")
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0")
    parser.add_argument("--method", help="per_gpu, keep_total or max_memory")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument(
        "--allow-changed-recipe",
        action="store_true",
        help="resume with another recipe than the training was started with",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    parser.set_defaults(command=_train)


def _train(arguments: argparse.Namespace) -> int:
    from d2scale.config import load_cfg
    from d2scale.engine.run import train

    cfg = load_cfg(arguments.config_file, arguments.opts)
    if arguments.allow_changed_recipe:
        cfg.D2SCALE.ALLOW_CHANGED_RECIPE = True
    train(
        cfg,
        num_processes=arguments.num_processes,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        resume=arguments.resume,
        eval_only=arguments.eval_only,
        method=arguments.method,
    )
    return 0


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = _add_command(
        commands, "demo", "plan, train and compare the three published experiments in small"
    )
    parser.add_argument("--output-dir", default="demo", metavar="DIR", help="run folders (demo)")
    parser.set_defaults(command=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    from d2scale.demo import run_demo

    for part in run_demo(arguments.output_dir):
        print(part, flush=True)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from d2scale.doctor import diagnose

    print(diagnose())
    return 0


if __name__ == "__main__":
    sys.exit(main())
