"""Does the split of a step change the training, and what does keeping it the same cost?

    python benchmarks/exactness.py [--only gradients weights time] [--steps 20]

Trains a small MetaFCOS (ResNet-18, GN) on small images with 1 to 4 processes on CPUs. The images
are those of coco_2017_train under DETECTRON2_DATASETS, or drawn shapes if there are none. Prints
a table and keeps it, with the machine that it was made on, in results/exactness.json.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from machine import keep
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2scale.coco.dataset import load_training_dataset
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.engine.data.loader import TrainLoader, build_train_loader
from d2scale.engine.data.sampling import rank_slice
from d2scale.engine.launch import Topology, launch
from d2scale.engine.models import build_model
from d2scale.engine.solver import build_lr_schedule, build_optimizer
from d2scale.engine.step import build_step
from d2scale.engine.trainer import Trainer
from d2scale.planning.rules import split_evenly
from d2scale.step.micro_batches import cut
from d2scale.step.optimizer_step import OptimizerStep
from d2scale.step.ranks import rank, sum_over_ranks, world_size

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
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {REFERENCE_WORLD_SIZE: 1, BASE_LR: 0.001, MAX_ITER: 1000, STEPS: [], WARMUP_ITERS: 5}
SEED: 7
"""
SEED = 7
# 13 is uneven on every number of ranks but one.
BATCHES = (16, 13)
TOLERANCE = {"gradients": {"float64": 1e-10, "float32": 1e-5},
             "weights": {"float64": 1e-8, "float32": 1e-4}}  # fmt: skip

Rows = list[dict[str, Any]]
Tensors = dict[str, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--steps", type=int, default=20, help="of the weights and time rows")
    args = parser.parse_args()
    with datasets() as data, recipe() as cfg:
        rows = [
            {"part": part, "data": data, **row}
            for part in args.only
            for row in PARTS[part](cfg, args.steps)
        ]
    for part in args.only:
        mine = [row for row in rows if row["part"] == part]
        keys = [key for key in dict.fromkeys(chain(*mine)) if key not in ("part", "data")]
        print(f"\n{part}, {data}")
        print(tabulate([[row.get(key, "") for key in keys] for row in mine], keys, tablefmt="pipe"))
    keep("exactness", rows, "part")


@contextmanager
def datasets() -> Iterator[str]:
    """Make coco_2017_train readable and say what it is."""
    root = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    if (root / "coco" / "annotations").exists():
        yield "COCO images"
        return
    with tempfile.TemporaryDirectory() as folder:
        write_shapes_dataset(Path(folder), 64, 2, image_size=(64, 96))
        os.environ["DETECTRON2_DATASETS"] = folder
        yield "drawn shapes"


@contextmanager
def recipe() -> Iterator[CfgNode]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(RECIPE)
        yield load_cfg(str(path), ["OUTPUT_DIR", folder])


def gradient_rows(cfg: CfgNode, steps: int) -> Rows:
    """Gradient of one step against that of the one big batch."""
    cases = [
        {"dtype": dtype, "total batch": total, "micro-batches": a, "guard": guard}
        for dtype in TOLERANCE["gradients"]
        for total in BATCHES
        for a in (1, 2, 4)
        for guard in (False, True)
    ]
    rows = []
    for ranks in (1, 2, 3, 4):
        for case, errors in zip(cases, on_ranks(ranks, gradient_errors, cfg, cases), strict=True):
            allowed = TOLERANCE["gradients"][case["dtype"]]
            rows.append({"ranks": ranks, **case, **verdict(*errors, allowed)})
    return rows


def weight_rows(cfg: CfgNode, steps: int) -> Rows:
    """Weights after some steps against those of one rank and one piece."""
    rows = []
    wholes: dict[str, Tensors] = {}
    for ranks in (1, 2, 4):
        cases = [
            {"dtype": dtype, "images per GPU": ims_per_gpu, "guard": guard}
            for dtype in TOLERANCE["weights"]
            for ims_per_gpu in (16 // ranks, 3)
            for guard in (False, True)
        ]
        for case, found in zip(
            cases, on_ranks(ranks, trained_weights, cfg, cases, steps), strict=True
        ):
            dtype = case["dtype"]
            whole = wholes.setdefault(dtype, found)
            if found is not whole:
                error = distance(found, whole)
                result = verdict(error, 0.0, TOLERANCE["weights"][dtype])
                result["worst tensor"] = float(f"{relative_error(found, whole):.2g}")
                rows.append({"ranks": ranks, **case, "steps": steps, **result})
    return rows


def verdict(error: float, rounding: float, allowed: float) -> dict[str, Any]:
    """Judge an error; ``rounding`` is that of the big batch itself, in float32.

    With one image oneDNN takes other kernels than with several, and where a ReLU stands at zero
    the two may fall on different sides: then no split can be nearer than the big batch's own
    distance from the exact gradient.
    """
    holds = "yes" if error < allowed else "to rounding" if error < 2 * rounding else "NO"
    found = {"relative error": float(f"{error:.2g}"), "allowed": allowed, "holds": holds}
    return {**found, "big batch's rounding": float(f"{rounding:.2g}")} if rounding else found


def time_rows(cfg: CfgNode, steps: int) -> Rows:
    """Milliseconds of a step, the median of several, and of what it is compared with."""
    measured = [
        (1, guard_seconds, "16 images, guarded", "plain"),
        (2, guard_seconds, "16 images, guarded", "plain: DDP averages during backward"),
        (1, split_seconds, "4 micro-batches of 4, exact", "4 plain ones"),
        (1, exact_seconds, "16 images and their loading, EXACT on", "EXACT off"),
    ]
    rows = []
    for ranks, function, name, against in measured:
        before, after = (1000 * seconds for seconds in on_ranks(ranks, function, cfg, steps))
        rows.append(
            {"ranks": ranks, "step": name, "ms": round(after, 1), "against": against,
             "its ms": round(before, 1), "change": f"{after / before - 1:+.1%}"}
        )  # fmt: skip
    return rows


PARTS: dict[str, Callable[[CfgNode, int], Rows]] = {
    "gradients": gradient_rows,
    "weights": weight_rows,
    "time": time_rows,
}


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> Any:
    return launch(function, args, Topology(ranks), use_cuda=False)


@contextmanager
def default_dtype(name: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def new_model(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(SEED)
    return build_model(cfg).train()


def loader(
    cfg: CfgNode, total: int, *, ranks: int = 1, this: int = 0, exact: bool = True
) -> TrainLoader:
    return build_train_loader(
        cfg,
        load_training_dataset(cfg),
        world_size=ranks,
        rank=this,
        ims_per_batch=total,
        seed=SEED,
        start_state=None,
        exact=exact,
    )


def gradient_errors(cfg: CfgNode, cases: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Relative error of the gradient of each case, and of the big batch's own.

    Only rank 0 compares.
    """
    errors = []
    wholes: dict[tuple[str, int], tuple[Tensors, float]] = {}
    for case in cases:
        key = dtype, total = case["dtype"], case["total batch"]
        with default_dtype(dtype):
            samples = next(loader(cfg, total))
            if key not in wholes and rank() == 0:
                wholes[key] = big_batch(cfg, samples)
            found = split_gradients(cfg, samples, case["micro-batches"], case["guard"])
        if rank() == 0:
            whole, rounding = wholes[key]
            errors.append((relative_error(found, whole), rounding))
    return errors


def big_batch(cfg: CfgNode, samples: list[Any]) -> tuple[Tensors, float]:
    """Gradient of all samples at once, and its distance from that of the same weights in double."""
    gradients = []
    for dtype in (torch.get_default_dtype(), torch.float64):
        model = new_model(cfg).to(dtype)
        sum(model(samples).values()).backward()
        gradients.append(gradients_of(model))
    return gradients[0], relative_error(*gradients)


def split_gradients(cfg: CfgNode, samples: list[Any], micro_batches: int, guard: bool) -> Tensors:
    """Gradient of a step that is split over all ranks, each with about so many micro-batches."""
    total = len(samples)
    rank_batch = samples[rank_slice(total, world_size(), rank())]
    largest = max(split_evenly(total, world_size()))
    model = new_model(cfg)
    step = new_step(cfg, model, math.ceil(largest / micro_batches), guard=guard)
    gradients: Tensors = {}
    step(rank_batch, lambda _: gradients.update(gradients_of(model)))
    return {name: gradient.clone() for name, gradient in gradients.items()}


def new_step(cfg: CfgNode, model: nn.Module, ims_per_gpu: int, *, guard: bool) -> OptimizerStep:
    own = cfg.clone()
    own.D2SCALE.ON_OOM = "split" if guard else "raise"
    return build_step(own, model, ims_per_gpu=ims_per_gpu)


def trained_weights(
    cfg: CfgNode, cases: list[dict[str, Any]], steps: int, total: int = 16
) -> list[Tensors]:
    """Weights after some steps of ``total`` images, for each case."""
    found = []
    for case in cases:
        with default_dtype(case["dtype"]):
            model = new_model(cfg)
            trainer = new_trainer(
                cfg, model, case["images per GPU"], guard=case["guard"], total=total
            )
            trainer.train(steps, ())
            found.append({name: value.detach() for name, value in model.named_parameters()})
    return found


def new_trainer(
    cfg: CfgNode,
    model: nn.Module,
    ims_per_gpu: int,
    *,
    guard: bool,
    exact: bool = True,
    total: int = 16,
) -> Trainer:
    step = new_step(cfg, model, ims_per_gpu, guard=guard)
    data = loader(cfg, total, ranks=world_size(), this=rank(), exact=exact)
    return Trainer(step, data, build_lr_schedule(cfg, step.optimizer), seed=SEED)


def guard_seconds(cfg: CfgNode, steps: int) -> list[float]:
    """Median seconds of a step on this rank: plain, and guarded, without the loading of data."""
    samples = next(loader(cfg, 16))
    rank_batch = samples[rank_slice(16, world_size(), rank())]
    guarded = new_step(cfg, new_model(cfg), 16 // world_size(), guard=True)
    return medians([plain_step(cfg, rank_batch), partial(guarded, rank_batch)], steps)


def plain_step(cfg: CfgNode, rank_batch: list[Any]) -> Callable[[], None]:
    """Return what a user would write: DistributedDataParallel, one forward, exact normalizers."""
    model = new_model(cfg)
    optimizer = build_optimizer(cfg, model)
    wrapped = DistributedDataParallel(model) if world_size() > 1 else model

    def step() -> None:
        optimizer.zero_grad()
        totals = model.loss_normalizers(rank_batch)
        totals = {name: sum_over_ranks(total) for name, total in totals.items()}
        normalizers = model.finish_normalizers(totals, world_size())
        losses = wrapped(rank_batch, normalizers=normalizers)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()

    return step


def split_seconds(cfg: CfgNode, steps: int) -> list[float]:
    """Four micro-batches as they are without exactness, and with it."""
    samples = next(loader(cfg, 16))
    plain_model = new_model(cfg)
    exact = new_step(cfg, new_model(cfg), 4, guard=False)
    optimizer = build_optimizer(cfg, plain_model)

    def plain() -> None:
        optimizer.zero_grad()
        for micro_batch in cut(samples, 4):
            (sum(plain_model(micro_batch).values()) / 4).backward()
        optimizer.step()

    return medians([plain, partial(exact, samples)], steps)


def exact_seconds(cfg: CfgNode, steps: int) -> list[float]:
    """A step with its data, EXACT off and on."""
    trainers = [
        new_trainer(cfg, new_model(cfg), 16, guard=False, exact=exact) for exact in (False, True)
    ]
    return medians([trainer.take_step for trainer in trainers], steps)


def medians(runs: list[Callable[[], Any]], steps: int) -> list[float]:
    """Seconds of each run; they take turns, so that a busy machine slows all of them."""
    seconds: list[list[float]] = [[] for _ in runs]
    for step in range(steps + 2):
        for run, mine in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if step >= 2:
                mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in seconds]


def gradients_of(model: nn.Module) -> Tensors:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_error(found: Tensors, expected: Tensors) -> float:
    """Largest error of any tensor, relative to its norm."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - value).norm() / value.norm().clamp(min=1e-30))
        for name, value in expected.items()
    )


def distance(found: Tensors, expected: Tensors) -> float:
    """Error of all tensors as one vector, relative to its norm."""
    errors = sum(float((found[name] - value).norm()) ** 2 for name, value in expected.items())
    return math.sqrt(errors / sum(float(value.norm()) ** 2 for value in expected.values()))


if __name__ == "__main__":
    main()
