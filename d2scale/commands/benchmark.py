"""``d2scale benchmark``: measure inference time and training throughput."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from d2scale.commands.common import Commands, add_command, add_recipe, emit

_EPILOG = """\
Inference time is the mean of forward and post-processing over single images. Without
the config's datasets, or with --data random, it is measured on random images; without
MODEL.WEIGHTS, on random weights. The report says which.

examples, the whole and a short form for a CPU:
  $ d2scale benchmark d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml
  $ d2scale benchmark d2scale://MetaFCOS/small-cpu.yaml --images 20 --steps 5 -o speed.json
"""
_IMAGES = {"cuda": 200, "cpu": 20}


def add_parser(commands: Commands) -> None:
    """Add ``d2scale benchmark``."""
    text = "measure inference time and training throughput"
    parser = add_command(commands, "benchmark", text, run, epilog=_EPILOG, takes_opts=True)
    add_recipe(parser)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="(MODEL.DEVICE, if it is there)")
    add("--only", choices=("inference", "training"), help="one of the two (both)")
    add("--data", choices=("auto", "real", "random"), default="auto", help="images (auto)")
    add("--images", type=int, metavar="N", help="images to detect on (200, on a CPU 20)")
    add("--warmup", type=int, metavar="N", help="images before that (a tenth of them)")
    add("--steps", type=int, default=20, metavar="N", help="training steps (20)")
    add("--ims-per-gpu", type=int, default=0, metavar="M", help="images a step (the recipe's)")
    add("--format", choices=("table", "json"), default="table")
    add("-o", "--output", metavar="FILE", help="write there, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale benchmark``."""
    import torch

    from d2scale.benchmark.measure import PARTS, BenchmarkOptions, benchmark, to_table
    from d2scale.engine.config import load_cfg

    cfg = load_cfg(arguments.config, arguments.opts)
    if arguments.device is not None:
        cfg.MODEL.DEVICE = arguments.device
    elif cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    images = _IMAGES.get(cfg.MODEL.DEVICE, 1) if arguments.images is None else arguments.images
    options = BenchmarkOptions(
        parts=PARTS if arguments.only is None else (arguments.only,),
        data=arguments.data,
        images=images,
        warmup=max(1, images // 10) if arguments.warmup is None else arguments.warmup,
        steps=arguments.steps,
        ims_per_gpu=arguments.ims_per_gpu,
    )
    result = benchmark(cfg, options)
    text = json.dumps(asdict(result), indent=1)
    if arguments.output is not None:
        emit(text + "\n", arguments.output)
    print(text if arguments.format == "json" else to_table(result))
    return 0
