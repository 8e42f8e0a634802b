"""Batch finders on a simulated device: d2scale's, and those that users have today.

    pip install lightning accelerate ultralytics
    python benchmarks/memory_finders.py [--kind equal] [--images 15 23]

Without a finder's package its row is left out. A finder's batch is trained for an epoch: a step
that runs out of memory there is a failure. See ``simulated.py`` for the device and the images.

The finders run as they come from the package index. Lightning takes three steps a trial.
accelerate's decorator goes around the whole epoch, as its documentation has it. Ultralytics'
``autobatch`` measures through CUDA, so it is given measurements of this device (forward and
backward of one batch of the largest images, as it takes them) and decides by itself.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from contestants import exact_losses
from machine import keep, table_of
from simulated import BOXES, COCO_LIKE, EQUAL, IMAGES, Bench, Choice, d2scale_probe
from torch import nn

from d2scale.memory.devices import SimulatedDevice
from d2scale.planning.memory_profile import GIB
from d2scale.step.out_of_memory import OutOfMemoryError


def accelerate_finder(bench: Bench, budget_bytes: int) -> Choice:
    """accelerate's decorator around an epoch, from 128 images."""
    from accelerate.utils import find_executable_batch_size

    tried = []

    @find_executable_batch_size(starting_batch_size=128)
    def train(batch_size: int) -> int:
        tried.append(batch_size)
        step = bench.new_step()
        with SimulatedDevice(budget_bytes).limited(budget_bytes, step.held_tensors()):
            step.ims_per_gpu = batch_size
            for batch in bench.batches(batch_size):
                step(batch)
        return batch_size

    return int(train()), len(tried)


def lightning_finder(mode: str) -> Callable[[Bench, int], Choice]:
    """Lightning's batch-size finder with its own defaults."""

    def find(bench: Bench, budget_bytes: int) -> Choice:
        import lightning

        module = _lightning_module(bench)
        with tempfile.TemporaryDirectory() as folder:
            trainer = lightning.Trainer(
                accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
            )  # fmt: skip
            held = module.step.held_tensors()
            with SimulatedDevice(budget_bytes).limited(budget_bytes, held):
                tuner = lightning.pytorch.tuner.Tuner(trainer)
                chosen = tuner.scale_batch_size(module, mode=mode)
        return int(chosen or 0), len(module.tried)

    return find


def _lightning_module(bench: Bench) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2
            self.tried: list[int] = []
            self.step = bench.new_step()
            self.model: nn.Module = self.step.model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            if index == 0:
                self.tried.append(self.batch_size)
            return torch.stack(list(exact_losses(self.model, batch).values())).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.step.optimizer

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(
                bench.samples,  # type: ignore[arg-type]
                batch_sampler=bench.batch_indices(self.batch_size),
                collate_fn=list,
            )

        def transfer_batch_to_device(self, batch: Any, *arguments: Any) -> Any:
            return batch

    return Module()


def ultralytics_finder(bench: Bench, budget_bytes: int) -> Choice:
    """Ultralytics' decision from forwards and backwards that were measured on this device."""
    from ultralytics.utils import LOGGER, autobatch

    LOGGER.setLevel(logging.ERROR)
    tried = []

    def profile_ops(inputs: list[torch.Tensor], *arguments: Any, **options: Any) -> list[Any]:
        results: list[Any] = []
        for tensor in inputs:
            tried.append(len(tensor))
            step, device = bench.new_step(), SimulatedDevice(budget_bytes)
            batch = bench.worst_case.samples(len(tensor))
            with device.limited(budget_bytes, step.held_tensors()):
                try:
                    torch.stack(list(exact_losses(step.model, batch).values())).sum().backward()
                    results.append([0, 0, device.peaks()[0] / GIB])
                except OutOfMemoryError:
                    results.append(None)
        return results

    cuda = SimpleNamespace(
        get_device_properties=lambda _: SimpleNamespace(name="", total_memory=budget_bytes),
        memory_reserved=lambda _: 0,
        mem_get_info=lambda _: (budget_bytes, budget_bytes),
        empty_cache=lambda: None,
    )
    parameter = SimpleNamespace(device=torch.device("cuda", 0))
    model: Any = SimpleNamespace(parameters=lambda: iter([parameter]), yaml={})
    with (
        mock.patch.object(autobatch, "profile_ops", profile_ops),
        mock.patch.object(autobatch, "get_torch_device_backend", return_value=cuda),
    ):
        chosen = autobatch.autobatch(model, 32, max_num_obj=BOXES, dataset_size=IMAGES)
    return int(chosen), len(tried)


KINDS = {"equal": EQUAL, "like COCO's": COCO_LIKE}
PEERS: dict[str, Callable[[Bench, int], Choice]] = {
    "d2scale": d2scale_probe,
    "accelerate find_executable_batch_size": accelerate_finder,
    "Lightning BatchSizeFinder, power": lightning_finder("power"),
    "Lightning BatchSizeFinder, binsearch": lightning_finder("binsearch"),
    "Ultralytics autobatch": ultralytics_finder,
}


def rows(bench: Bench, kind: str, images: int) -> Iterator[dict[str, Any]]:
    """Yield one row a finder, on a budget for about ``images``."""
    budget_bytes = bench.budget_for(images)
    most = bench.most(budget_bytes, near=d2scale_probe(bench, budget_bytes)[0])
    failures: dict[int, int] = {}
    for name, find in PEERS.items():
        try:
            chosen, trials = find(bench, budget_bytes)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")
            continue
        if chosen not in failures:
            failures[chosen] = bench.failures(chosen, budget_bytes)
        yield {
            "key": f"{kind}, {images}, {name}",
            "images": kind,
            "budget MB": round(budget_bytes / 1e6, 1),
            "most that trains": most,
            "finder": name,
            "chosen": chosen,
            "of the most %": round(100 * chosen / most),
            "sizes tried": trials,
            "steps out of memory in an epoch": failures[chosen],
        }


def main() -> None:
    """Run every finder on every budget, keep the rows, print them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--images", type=int, nargs="+", default=[15, 23], metavar="N")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    kept: list[dict[str, Any]] = []
    for kind, images in product(arguments.kind, arguments.images):
        for row in rows(Bench(KINDS[kind]), kind, images):
            kept = keep("memory_finders", [row], "key")
    print(table_of(kept))


if __name__ == "__main__":
    main()
