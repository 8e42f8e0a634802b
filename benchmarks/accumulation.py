"""What does gradient accumulation save? All-reduces after every micro-batch, or once a step.

    OMP_NUM_THREADS=1 python benchmarks/accumulation.py [--ranks 2] [--micro-batches 4] [--steps 5]

MetaFCOS on small images, with processes that exchange gradients by gloo: DistributedDataParallel
as it comes, the same with ``no_sync`` in all micro-batches but the last, and d2scale's step. All
divide by the loss normalizers of the whole step, so their gradients are equal. Prints a table and
keeps it, with the machine that it was made on, in results/accumulation.json.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from contestants import make_samples
from fvcore.common.config import CfgNode
from machine import keep, table_of
from split_steps import Tensors, gradients_of, medians, new_model, new_step, on_ranks, recipe
from split_steps import relative_error as error_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from d2scale.config import load_cfg
from d2scale.engine.solver import build_optimizer
from d2scale.step.micro_batches import cut
from d2scale.step.ranks import gather_objects, rank, sum_over_ranks, world_size

EVERY, ONCE, OURS = (
    "DDP, every micro-batch",
    "DDP with no_sync, once a step",
    "d2scale, once a step",
)
IMAGE = (64, 96)  # height and width, pixels
# A narrow ResNet-18, and the published recipe's ResNet-50 with eleven times its weights.
WIDE = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "SEED", "7")

Row = dict[str, Any]
Step = Callable[[], Any]


def ddp_step(cfg: CfgNode, samples: Sequence[Any], *, once: bool) -> tuple[nn.Module, Step]:
    """Return a model and what trains it, an image a micro-batch, as its user would write it."""
    model = new_model(cfg)
    optimizer = build_optimizer(cfg, model)
    wrapped = DistributedDataParallel(model)
    parts = cut(samples, 1)

    def step() -> None:
        optimizer.zero_grad()
        totals = model.loss_normalizers(samples)
        totals = {name: sum_over_ranks(total) for name, total in totals.items()}
        normalizers = model.finish_normalizers(totals, world_size())
        for number, part in enumerate(parts, start=1):
            waits = once and number < len(parts)
            with wrapped.no_sync() if waits else nullcontext():
                losses = wrapped(part, normalizers=normalizers)
                torch.stack([*losses.values()]).sum().backward()
        optimizer.step()

    return wrapped, step


def own_step(cfg: CfgNode, samples: Sequence[Any]) -> tuple[nn.Module, Step]:
    """Return a model and d2scale's step, an image a micro-batch."""
    model = new_model(cfg)
    return model, partial(new_step(cfg, model, 1, guard=False), samples)


@contextmanager
def counting(model: nn.Module) -> Iterator[list[int]]:
    """Yield a list that takes the bytes of each all-reduce of gradients on this rank."""
    counted: list[int] = []
    if isinstance(model, DistributedDataParallel):
        # torch takes no hook with annotations that are text.
        model.register_comm_hook(counted, lambda counted, bucket: _mean(counted, bucket.buffer()))
        yield counted
        return
    reduce = dist.all_reduce

    def all_reduce(tensor: Any, *args: Any, async_op: bool = False, **options: Any) -> Any:
        if async_op:  # losses and counts are waited for, gradients are not
            counted.append(tensor.nbytes)
        return reduce(tensor, *args, async_op=async_op, **options)

    with mock.patch.object(dist, "all_reduce", all_reduce):
        yield counted


def _mean(counted: list[int], gradients: torch.Tensor) -> Any:
    counted.append(gradients.nbytes)
    work = dist.all_reduce(gradients, async_op=True)
    return work.get_future().then(lambda future: future.value()[0].div_(world_size()))


def measure(cfg: CfgNode, micro_batches: int, steps: int) -> list[Row]:
    """Return a row a way, of this rank's steps; the slowest rank's seconds."""
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    logging.disable(logging.WARNING)  # of random weights with frozen norms
    count = micro_batches * world_size()
    samples = make_samples(count, *IMAGE)[rank() * micro_batches : (rank() + 1) * micro_batches]
    build = {
        EVERY: partial(ddp_step, once=False),
        ONCE: partial(ddp_step, once=True),
        OURS: own_step,
    }
    rows: list[Row] = []
    gradients: list[Tensors] = []
    for way, make in build.items():
        model, step = make(cfg, samples)
        # DDP lays its buckets out anew after its first step.
        step()
        with counting(model) as counted:
            step()
        rows.append({"way": way, "all-reduces": len(counted), "MB a step": sum(counted) / 1e6})
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        gradients.append(gradients_of(bare))
    ready = [make(cfg, samples)[1] for make in build.values()]
    seconds = [max(gather_objects(taken)) for taken in medians(ready, steps)]
    for row, own, taken in zip(rows, gradients, seconds, strict=True):
        row["MB a step"] = round(row["MB a step"], 1)
        row["s a step"] = round(taken, 4)
        row["of every micro-batch"] = f"{taken / seconds[0]:.0%}"
        row["gradient's distance"] = float(f"{error_of(own, gradients[0]):.1g}")
    return rows


def run(models: Sequence[str], ranks: int, micro_batches: int, steps: int) -> list[Row]:
    """Return the rows of all models and ways."""
    rows = []
    for name in models:
        with recipe() as narrow:
            cfg = narrow
            if name == WIDE_NAME:
                cfg = load_cfg("d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml", WIDE)
            for row in on_ranks(ranks, measure, cfg, micro_batches, steps):
                setting = {"model": name, "ranks": ranks, "micro-batches": micro_batches}
                key = ", ".join(map(str, (row["way"], *setting.values())))
                rows.append({"key": key, **setting, **row})
    return rows


NARROW_NAME, WIDE_NAME = "narrow R-18", "R-50"


def main() -> None:
    """Measure, keep the rows, print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--discard", action="store_true", help="do not keep the rows")
    options = parser.parse_args()
    models = (NARROW_NAME, WIDE_NAME)
    rows = run(models, options.ranks, options.micro_batches, options.steps)
    if not options.discard:
        rows = keep("accumulation", rows, "key")
    print(table_of(rows))


if __name__ == "__main__":
    main()
