"""Does a training that was stopped, killed or moved end where the undisturbed one ends?

    python benchmarks/resume.py [--only moved killed] [--kills 30] [--ranks 1 2]

Trains a small MetaFCOS (ResNet-18, GN) on drawn shapes, on CPUs, with D2SCALE.EXACT. "moved": 10
of 20 steps, then the rest on other ranks or micro-batches. "killed": the command is killed at
random moments, as many times on each number of ranks (``kills.py``). Prints a table and keeps it,
with the machine that it was made on, in results/resume.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
from kills import killed, load
from machine import keep, table_of
from split_steps import Tensors, default_dtype, distance, new_model, weights_of

from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.data.loader import TrainLoader
from d2scale.engine.trainer import Trainer
from d2scale.step.ranks import rank

RECIPE = """
_BASE_: d2scale://MetaFCOS/Base-MetaFCOS.yaml
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  RESNETS: {DEPTH: 18, STEM_OUT_CHANNELS: 32, RES2_OUT_CHANNELS: 32, NORM: GN}
  BACKBONE: {FREEZE_AT: 0}
  FPN: {OUT_CHANNELS: 64}
  FCOS: {NUM_CLS_CONVS: 1, NUM_BOX_CONVS: 1}
INPUT: {MIN_SIZE_TRAIN: [64, 72], MAX_SIZE_TRAIN: 96}
DATASETS: {TEST: []}
DATALOADER: {NUM_WORKERS: 0}
D2SCALE: {EXACT: true}
SOLVER: {REFERENCE_WORLD_SIZE: 1, IMS_PER_BATCH: 6, BASE_LR: 0.001, MAX_ITER: 20, STEPS: [15],
         WARMUP_ITERS: 5, CHECKPOINT_PERIOD: 2}
WRITER_PERIOD: 1
SEED: 7
"""
STEPS = 20
# (ranks, images per GPU) before and after step 10.
MOVES = (((2, 3), (1, 6)), ((1, 6), (3, 2)), ((1, 6), (1, 2)), ((3, 1), (2, 2)))

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=("moved", "killed"))
    parser.add_argument("--kills", type=int, default=30, metavar="N")
    parser.add_argument("--ranks", type=int, nargs="+", default=(1, 2), metavar="N")
    arguments = parser.parse_args()
    wanted = arguments.only or ("moved", "killed")
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="d2scale-") as name:
        root = Path(name)
        write_shapes_dataset(root / "data", 32, 2, image_size=(64, 96))
        os.environ["DETECTRON2_DATASETS"] = str(root / "data")
        (root / "recipe.yaml").write_text(RECIPE)
        of_kills = (killed(root, arguments.kills, ranks) for ranks in arguments.ranks)
        rows = {"moved": moved(root), "killed": of_kills}
        for row in chain.from_iterable(rows[part] for part in wanted):
            kept = keep("resume", [row], "what")
            print(*row.values(), sep=", ", file=sys.stderr, flush=True)
    print(table_of(kept))


def moved(root: Path) -> Iterator[Row]:
    """Move trainings; compare with the undisturbed one, and that with itself in other pieces."""
    cfg = load_cfg(str(root / "recipe.yaml"))
    for dtype in ("float32", "float64"):
        with default_dtype(dtype):
            start = weights_of(new_model(cfg))

        def apart(folder: Path, expected: Path, start: Tensors = start) -> float:
            found, weights = (load(each)["model"] for each in (folder, expected))
            return distance(found, {name: weights[name] for name in start}, start)

        wholes = [root / f"{dtype}-{ims_per_gpu}" for ims_per_gpu in (6, 3, 2)]
        for folder in wholes:
            run(root, folder, 1, int(folder.name[-1]), dtype)
        spread = max(apart(*pair) for pair in combinations(wholes, 2))
        for number, (before, after) in enumerate(MOVES):
            folder = root / f"{dtype}-move{number}"
            run(root, folder, *before, dtype, stop=STEPS // 2)
            run(root, folder, *after, dtype, resume=True)
            allowed = 1e-8 if dtype == "float64" else spread
            same = images(folder, before[0], after[0]) == images(wholes[0], 1)
            what = "{} ranks, m = {}, then {} ranks, m = {}".format(*before, *after)
            error = apart(folder, wholes[0])
            yield row_of(f"{what}, {dtype}", "weights", error, allowed, same)
    yield other_batch(root)


def other_batch(root: Path) -> Row:
    """From 6 images a step to 4: which images of an epoch are shown twice, or never?"""
    folder = root / "other"
    run(root, folder, 1, 6, "float32", stop=STEPS // 2)
    run(root, folder, 2, 2, "float32", resume=True, method="max_memory")
    steps = images(folder, 1, 2)
    state = load(folder)["sampler"]
    shown = [image for step in steps for image in step]
    size, waiting = state["size"], len(state["waiting"])
    drawn = state["epoch"] * size + state["position"]
    counts = [shown.count(image) for image in set(shown)]
    even = max(counts) - min(counts) <= 1 and len(shown) + waiting == drawn
    more = len(shown) - STEPS * 6
    return row_of("total batch 6, then 4", f"images beyond the recipe: {more}", None, None, even)


def row_of(what: str, of: str, error: float | None, allowed: float | None, same: bool) -> Row:
    passed = same and (error is None or allowed is None or error <= allowed)
    return {
        "what": what,
        "compared": of,
        "of the change": None if error is None else f"{error:.1e}",
        "allowed": None if allowed is None else f"{allowed:.1e}",
        "same images": same,
        "passed": passed,
    }


def run(
    root: Path,
    folder: Path,
    ranks: int,
    ims_per_gpu: int,
    dtype: str,
    *,
    stop: int = 0,
    resume: bool = False,
    method: str = "keep_total",
) -> None:
    """Train in a process of its own; with ``stop`` it is killed before that step."""
    command = [
        *(sys.executable, __file__, "train", "--config-file", str(root / "recipe.yaml")),
        *("--num-gpus", str(ranks), "--method", method, *(["--resume"] if resume else [])),
        *("OUTPUT_DIR", str(folder), "D2SCALE.IMS_PER_GPU", str(ims_per_gpu)),
    ]
    accidents = {"BENCHMARK_DTYPE": dtype, "BENCHMARK_STOP": str(stop)}
    names = {"BENCHMARK_IMAGES": f"{folder}-{'after' if resume else 'before'}"}
    done = subprocess.run(  # noqa: S603  this very file
        command, env={**os.environ, **accidents, **names}, capture_output=True, text=True
    )
    if (done.returncode != 0) != bool(stop):
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])


def images(folder: Path, *ranks: int) -> list[list[int]]:
    """Image ids of every step, as the ranks before and after the stop have noted them."""
    steps = []
    for part, count in zip(("before", "after"), ranks, strict=False):
        files = [Path(f"{folder}-{part}.{number}") for number in range(count)]
        notes = [[json.loads(line) for line in f.read_text().splitlines()] for f in files]
        limit = STEPS // 2 if part == "before" and len(ranks) == 2 else None
        # A rank may have loaded a step that the killed one never took.
        steps += [[i for share in step for i in share] for step in list(zip(*notes))[:limit]]  # noqa: B905
    return steps


def prepare_rank() -> None:
    """In a process that ``run`` has started: data type, notes of the images, and the stop."""
    torch.set_default_dtype(getattr(torch, os.environ["BENCHMARK_DTYPE"]))
    torch.set_num_threads(1)
    take_step, following = Trainer.take_step, TrainLoader.__next__
    stop = int(os.environ["BENCHMARK_STOP"])

    def stopping(trainer: Trainer) -> Any:
        if stop and trainer.next_iteration == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(trainer)

    def noting(loader: TrainLoader) -> Any:
        samples = following(loader)
        with open(f"{os.environ['BENCHMARK_IMAGES']}.{rank()}", "a") as file:
            file.write(json.dumps([sample["image_id"] for sample in samples]) + "\n")
        return samples

    Trainer.take_step = stopping  # type: ignore[method-assign]
    TrainLoader.__next__ = noting  # type: ignore[method-assign]


if "BENCHMARK_DTYPE" in os.environ:
    prepare_rank()
if __name__ == "__main__":
    if "BENCHMARK_DTYPE" in os.environ:
        from d2scale import cli

        sys.exit(cli.main(sys.argv[1:]))
    main()
