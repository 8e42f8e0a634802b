"""Why not DataParallel? One process that drives several devices against a process for each.

    OMP_NUM_THREADS=1 python benchmarks/data_parallel.py [--devices 2] [--steps 12]

All ways train MetaFCOS with the same images a step. With two GPUs or more it is torch's own
nn.DataParallel, on the CPU a stand-in: a device is a thread on one core, and all is copied that
DataParallel copies between GPUs. The replicas' modules, which DataParallel makes anew in every
step, are made once, in its favour. Prints a table and keeps it, with the machine that it was made
on, in results/data_parallel.json.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from contestants import make_samples
from fvcore.common.config import CfgNode
from machine import keep, table_of
from split_steps import medians, new_model, new_step, recipe
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from d2scale.engine.solver import build_optimizer
from d2scale.launch.launch import Topology, launch
from d2scale.memory.tracker import StorageTracker
from d2scale.step.ranks import gather_objects, rank, world_size

IMAGE = (96, 128)  # height and width, pixels

Row = dict[str, Any]
Batch = tuple[Tensor, ...]  # images, boxes and classes, the first dimension is that of the images


class OnTensors(nn.Module):
    """A detector that takes what DataParallel can scatter: tensors, not lists of samples."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
        """Return the sum of the losses, shape (1,)."""
        height, width = images.shape[2:]
        samples = [
            {"image": image, "height": height, "width": width, "boxes": b, "classes": c}
            for image, b, c in zip(images, boxes, classes, strict=True)
        ]
        return torch.stack([*self.model(samples).values()]).sum()[None]


class ThreadedDataParallel:
    """What nn.DataParallel does in a step, on the CPU: a device is a thread.

    Attributes:
        watch: returns a context manager for what a device allocates, by its number.
        copied_bytes: between devices, in the last step.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, devices: int) -> None:
        self.model, self.optimizer = model, optimizer
        self._replicas = [copy.deepcopy(model) for _ in range(devices - 1)]
        self._threads = ThreadPoolExecutor(devices)
        self.watch: Callable[[int], AbstractContextManager[Any]] = lambda _: nullcontext()
        self.copied_bytes = 0

    def __call__(self, batch: Batch) -> None:
        """Scatter, replicate, compute in parallel, gather and reduce; update on the first."""
        self.copied_bytes = 0
        self.optimizer.zero_grad()
        modules = [self.model, *self._replicas]
        shares = list(zip(*(tensor.chunk(len(modules)) for tensor in batch), strict=True))
        for number, replica in enumerate(self._replicas, start=1):
            with self.watch(number):
                shares[number] = tuple(map(self._copy, shares[number]))
                self._replicate(replica)
        losses = [*self._threads.map(self._forward, range(len(modules)), modules, shares)]
        with self.watch(0):
            gathered = [losses[0], *(self._copy(loss.detach()) for loss in losses[1:])]
            torch.cat(gathered).mean()
        # As autograd has it on GPUs: a thread for each device.
        list(self._threads.map(self._backward, range(len(modules)), losses))
        with self.watch(0):
            for replica in self._replicas:
                self._reduce(replica)
            self.optimizer.step()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def _forward(self, number: int, module: nn.Module, share: Batch) -> Tensor:
        with self.watch(number):
            return module(*share)

    def _backward(self, number: int, loss: Tensor) -> None:
        with self.watch(number):
            (loss.sum() / (1 + len(self._replicas))).backward()

    @torch.no_grad()
    def _replicate(self, replica: nn.Module) -> None:
        for name in ("parameters", "buffers"):
            pairs = zip(getattr(replica, name)(), getattr(self.model, name)(), strict=True)
            for own, source in pairs:
                # New memory in every step, as DataParallel takes it.
                own.data = self._copy(source)
                own.grad = None

    @torch.no_grad()
    def _reduce(self, replica: nn.Module) -> None:
        arrived = [p.grad if p.grad is None else self._copy(p.grad) for p in replica.parameters()]
        for parameter, gradient in zip(self.model.parameters(), arrived, strict=True):
            if gradient is not None:
                parameter.grad += gradient

    def _copy(self, tensor: Tensor) -> Tensor:
        self.copied_bytes += tensor.nbytes
        return tensor.clone()


def make_batch(images: int) -> Batch:
    samples = make_samples(images, *IMAGE)
    return tuple(torch.stack([s[name] for s in samples]) for name in ("image", "boxes", "classes"))


def row(way: str, devices: int, seconds: float, held: Sequence[int], copied: int) -> Row:
    """Return a row; ``held`` are the bytes of each device at most."""
    others = [round(nbytes / 1e6, 1) for nbytes in held[1:]]
    return {
        "way": way,
        "devices": devices,
        "s a step": round(seconds, 4),
        "first device MB": round(held[0] / 1e6, 1),
        "other devices MB": max(others, default=None),
        "MB copied": round(copied / 1e6, 1),
    }


def one_process(cfg: CfgNode, devices: int, batch: Batch, steps: int) -> list[Row]:
    """Time one device and the stand-in for DataParallel in turns, then count their memory."""
    alone = ThreadedDataParallel(*_model_and_optimizer(cfg), devices=1)
    several = ThreadedDataParallel(*_model_and_optimizer(cfg), devices=devices)
    seconds = medians([partial(alone, batch), partial(several, batch)], steps)
    rows = []
    for runner, count, taken in ((alone, 1, seconds[0]), (several, devices, seconds[1])):
        way = "one device" if count == 1 else "DataParallel, stand-in of threads"
        rows.append(row(way, count, taken, _held(runner, count, batch), runner.copied_bytes))
        runner.close()
    return rows


def _model_and_optimizer(cfg: CfgNode) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = OnTensors(new_model(cfg))
    return model, build_optimizer(cfg, model)


def _held(runner: ThreadedDataParallel, devices: int, batch: Batch) -> list[int]:
    """Take a step and return the bytes that each device held at most."""
    trackers = [StorageTracker() for _ in range(devices)]
    runner.optimizer.zero_grad()
    # All of the batch is on the first device before it is scattered.
    trackers[0].count(*batch, *_of_training(runner.model, runner.optimizer))
    runner.watch = trackers.__getitem__
    runner(batch)
    return [tracker.peak_bytes for tracker in trackers]


def _of_training(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = (value for state in optimizer.state.values() for value in state.values())
    kept = [value for value in states if isinstance(value, Tensor)]
    return [*model.parameters(), *model.buffers(), *kept]


def on_gpus(cfg: CfgNode, devices: int, batch: Batch, steps: int) -> list[Row]:
    """Time one GPU and torch's nn.DataParallel in turns; the memory is the allocator's."""
    on_first = tuple(tensor.to("cuda:0") for tensor in batch)
    rows = []
    for count in (1, devices):
        model, optimizer = _model_and_optimizer(cfg)
        wrapped = nn.DataParallel(model, range(count))
        step = partial(_plain_step, wrapped, optimizer, on_first)
        for number in range(count):
            torch.cuda.reset_peak_memory_stats(number)
        (seconds,) = medians([step], steps)
        held = [torch.cuda.max_memory_allocated(number) for number in range(count)]
        weights = sum(p.nbytes for p in model.parameters())
        copied = (count - 1) * (2 * weights + sum(tensor.nbytes for tensor in batch) // count)
        way = "one device" if count == 1 else "nn.DataParallel"
        rows.append(row(way, count, seconds, held, copied))
    return rows


def _plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    model(*batch).mean().backward()
    optimizer.step()


def a_process_each(cfg: CfgNode, images: int, steps: int) -> list[Row]:
    """Return the rows of torch's DDP and of d2scale's step, on this rank's share of the images."""
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    share = images // world_size()
    samples = make_samples(images, *IMAGE)[rank() * share : (rank() + 1) * share]
    batch = tuple(tensor.chunk(world_size())[rank()] for tensor in make_batch(images))
    model, optimizer = _model_and_optimizer(cfg)
    ours = new_step(cfg, new_model(cfg), share, guard=False)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    bare = partial(_plain_step, model, optimizer, batch)
    bare()
    # DDP's buckets hold the gradients a second time.
    held = [_peak(bare, [*batch, *_of_training(model, optimizer)], optimizer) + gradients]
    plain = partial(_plain_step, DistributedDataParallel(model), optimizer, batch)
    seconds = medians([plain, partial(ours, samples)], steps)
    held.append(_peak(partial(ours, samples), ours.held_tensors(), ours.optimizer))
    # What all ranks send in a ring: each gradient 2 (n - 1) times.
    copied = 2 * (world_size() - 1) * gradients
    ways = ("DDP, a process for each device", "d2scale's step, a process for each device")
    return [
        row(way, world_size(), max(gather_objects(taken)), gather_objects(nbytes), copied)
        for way, taken, nbytes in zip(ways, seconds, held, strict=True)
    ]


def _peak(step: Callable[[], Any], held: Sequence[Tensor], optimizer: Any) -> int:
    """Return the bytes that a step allocates at most, with what is ``held`` between steps."""
    optimizer.zero_grad()
    with StorageTracker() as tracker:
        tracker.count(*held)
        step()
    return tracker.peak_bytes


def run(devices: int, images: int, steps: int) -> list[Row]:
    """Return the rows of all ways."""
    cuda = torch.cuda.device_count() >= devices > 1
    with recipe() as cfg:
        cfg.MODEL.DEVICE = "cuda" if cuda else "cpu"
        batch = make_batch(images)
        rows = (on_gpus if cuda else one_process)(cfg, devices, batch, steps)
        arguments = [cfg, images, steps]
        rows += launch(a_process_each, arguments, Topology(devices), use_cuda=cuda)
    alone = rows[0]["s a step"]
    return [
        {"key": f"{r['way']}, {r['devices']}", **r, "of one device": f"{r['s a step'] / alone:.0%}"}
        for r in rows
    ]


def main() -> None:
    """Measure, keep the rows, print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--images", type=int, default=16, help="in a step, over all devices")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--discard", action="store_true", help="do not keep the rows")
    options = parser.parse_args()
    if options.devices < 2 or options.images < 1 or options.images % options.devices:
        parser.error(
            f"--devices is {options.devices} and --images {options.images}; allowed: 2 devices or "
            "more, and a multiple of them as images, of which each device takes as many"
        )
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; allowed: 1 or more")
    torch.set_num_threads(1)
    rows = run(options.devices, options.images, options.steps)
    if not options.discard:
        rows = keep("data_parallel", rows, "key")
    print(table_of(rows))


if __name__ == "__main__":
    main()
