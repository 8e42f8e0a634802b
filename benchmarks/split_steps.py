"""Split steps of a small MetaFCOS on ranks: what ``exactness.py`` compares and times."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2scale.coco.dataset import load_training_dataset
from d2scale.config import load_cfg
from d2scale.engine.data.loader import TrainLoader, build_train_loader
from d2scale.engine.data.sampling import rank_slice
from d2scale.engine.models import build_model
from d2scale.engine.solver import build_lr_schedule, build_optimizer
from d2scale.engine.step import build_step
from d2scale.engine.trainer import Trainer
from d2scale.launch.launch import Topology, launch
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

Tensors = dict[str, Tensor]
# A sum over a step's images in another order differs by rounding alone.
ORDERS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "drawn": lambda images: images,
    "reversed": lambda images: images[::-1],
    "rotated": lambda images: images[len(images) // 2 :] + images[: len(images) // 2],
}


@contextmanager
def recipe() -> Iterator[CfgNode]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(RECIPE)
        yield load_cfg(str(path), ["OUTPUT_DIR", folder])


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
    """Weights after some steps of ``total`` images, for each case.

    All cases are shown the same images; a rank has its own in the case's "order", of ``ORDERS``.
    """
    batches: dict[str, list[Any]] = {}
    found = []
    for case in cases:
        with default_dtype(case["dtype"]):
            if case["dtype"] not in batches:
                drawn = loader(cfg, total, ranks=world_size(), this=rank())
                batches[case["dtype"]] = list(islice(drawn, steps))
            model = new_model(cfg)
            step = new_step(cfg, model, case["images per GPU"], guard=case["guard"])
            data = map(ORDERS[case.get("order", "drawn")], batches[case["dtype"]])
            schedule = build_lr_schedule(cfg, step.optimizer)
            Trainer(step, data, schedule, seed=SEED).train(steps, ())
            found.append(weights_of(model))
    return found


def weights_of(model: nn.Module) -> Tensors:
    return {name: value.detach() for name, value in model.named_parameters()}


def new_trainer(cfg: CfgNode, model: nn.Module, ims_per_gpu: int, *, exact: bool) -> Trainer:
    step = new_step(cfg, model, ims_per_gpu, guard=False)
    data = loader(cfg, 16, ranks=world_size(), this=rank(), exact=exact)
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


def noise_seconds(ims_per_gpu: int, cfg: CfgNode, steps: int) -> list[float]:
    """A step that measures the noise of its gradient or does not, measured last."""
    samples = next(loader(cfg, 16))
    rank_batch = samples[rank_slice(16, world_size(), rank())]
    step = new_step(cfg, new_model(cfg), ims_per_gpu, guard=False)
    return medians([partial(step, rank_batch), partial(step, rank_batch, measure=True)], steps)


def exact_seconds(cfg: CfgNode, steps: int) -> list[float]:
    """A step with its data, EXACT off and on."""
    trainers = [new_trainer(cfg, new_model(cfg), 16, exact=exact) for exact in (False, True)]
    return medians([trainer.take_step for trainer in trainers], steps)


def medians(runs: list[Callable[[], Any]], steps: int) -> list[float]:
    """Seconds of each run; they take turns, so that a busy machine slows all of them."""
    seconds: list[list[float]] = [[] for _ in runs]
    for step in range(steps + 2):
        for run, mine in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():  # a GPU may still be at work when its host is done
                torch.cuda.synchronize()
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


def distance(found: Tensors, expected: Tensors, before: Tensors) -> float:
    """Error of all tensors as one vector, relative to the norm of ``expected - before``.

    Against the norm of the weights themselves no training at all would look good: in a few steps
    they move by less than a hundredth of it.
    """
    errors = sum(float((found[name] - value).norm()) ** 2 for name, value in expected.items())
    changes = sum(float((value - before[name]).norm()) ** 2 for name, value in expected.items())
    return math.sqrt(errors / changes)
