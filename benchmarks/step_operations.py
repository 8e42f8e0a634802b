"""Count what the host does for a training step on a GPU: operations, and waits for the device.

    python benchmarks/step_operations.py [--images 2 16]

MetaFCOS R-50 at the published size, by the default engine's trainer, on fake tensors of a CUDA
device: no GPU is needed and nothing is computed. Every call that torch dispatches counts as an
operation, views too, for they take the host's time. A wait is a value that the host reads, or a
copy between host and device that is not asynchronous. The backward pass needs a device and is
left out; it has nothing that waits.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import repeat
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from machine import keep, table_of

from d2scale.config import load_cfg
from d2scale.engine.models import new_model
from d2scale.engine.solver import LearningRateSchedule
from d2scale.engine.step import build_step
from d2scale.engine.trainer import Trainer
from d2scale.memory.worst_case import WorstCase
from d2scale.step.private_torch import FakeTensor, FakeTensorMode, TorchDispatchMode, tree_leaves

RECIPE = "d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml"
WORST_CASE = WorstCase(((800, 1333),), 20, "a benchmark")
PRECISIONS = {
    "float32": (),
    "float16": ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "float16"),
}
# In which momentum, and the host's room for its copies, come into being.
_STEPS_BEFORE = 2
# Updates in place that have no rule for fake tensors.
_IN_PLACE = ("_fused_", "_amp_")


class HostWork(TorchDispatchMode):
    """Counts operations by the part of the step, and waits by what waits."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.part = "other"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the part of the step inside."""
        before, self.part = self.part, name
        try:
            yield
        finally:
            self.part = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        namespace, _, name = func.name().partition(".")[0].partition("::")
        self.operations[self.part] += namespace == "aten"
        if name == "_local_scalar_dense":
            self.waits["a value is read"] += args[0].is_cuda
            return 1.0
        if name.startswith(_IN_PLACE):
            return None
        result = func(*args, **(kwargs or {}))
        self._see_copy(name, args, kwargs or {}, result)
        return result

    def _see_copy(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        if name not in ("_to_copy", "copy_", "_foreach_copy_"):
            return
        position = {"copy_": 2, "_foreach_copy_": 2}.get(name, len(args))
        asynchronous = kwargs.get("non_blocking") or (len(args) > position and args[position])
        tensors = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors}
        if len(devices) > 1 and not asynchronous:
            self.waits["a copy"] += 1


def _fill_gradients(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


@contextmanager
def gpu_that_is_not_there(work: HostWork) -> Iterator[None]:
    """Within the context, CUDA's own calls do nothing, and values that are read are 1."""

    def read(tensor: torch.Tensor) -> Any:
        work.waits["a value is read"] += tensor.is_cuda
        return [1.0] * tensor.numel()

    stand_ins: dict[str, Any] = {
        "is_available": lambda: True,
        "Stream": MagicMock(),
        "current_stream": MagicMock(),
        "stream": MagicMock(),
        "get_rng_state": lambda device: torch.zeros(16, dtype=torch.uint8),
        "memory_stats": lambda device: {},
        "get_device_properties": MagicMock(),
    }
    with ExitStack() as stack:
        for name, stand_in in stand_ins.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        # torch asks the device for a little memory where it believes in one.
        stack.enter_context(patch("torch._subclasses.fake_tensor.init_gpu_context"))
        stack.enter_context(patch.object(FakeTensor, "tolist", read))
        stack.enter_context(patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor))
        yield


def count(precision: str, images: int, opts: Sequence[str] = ()) -> dict[str, Any]:
    """Return one row: operations and waits of a step."""
    work = HostWork()
    cfg = load_cfg(RECIPE, [*PRECISIONS[precision], *opts])
    with torch.device("meta"):  # older versions of torch cannot fill a fake tensor of a GPU
        model = new_model(cfg).train()
    with FakeTensorMode(allow_non_fake_inputs=True), gpu_that_is_not_there(work):
        model.to_empty(device="cuda")
        step = build_step(cfg, model, ims_per_gpu=images)
        step.phase = work.phase
        schedule = LearningRateSchedule(step.optimizer, ConstantParamScheduler(1.0), 100)
        trainer = Trainer(step, repeat(WORST_CASE.samples(images)), schedule, seed=0)
        fill = partial(_fill_gradients, model)
        with patch.object(torch.Tensor, "backward", lambda loss: fill()), work:
            for _ in range(_STEPS_BEFORE):
                trainer.take_step()
            work.operations.clear()
            work.waits.clear()
            trainer.take_step()
    work.operations.pop("backward", None)
    return {
        "key": f"{precision}, {images}",
        "precision": precision,
        "images": images,
        "operations of the forward": work.operations.pop("forward", 0),
        "of the update": work.operations.pop("optimizer", 0),
        "of the rest": sum(work.operations.values()),
        "waits": sum(work.waits.values()),
        "waits by kind": {kind: number for kind, number in work.waits.items() if number},
    }


def main() -> None:
    """Count for each precision and number of images, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", nargs="*", type=int, default=[2, 16])
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rows = [count(precision, images) for precision in PRECISIONS for images in arguments.images]
    print(table_of(rows))
    keep("step_operations", rows, "key")


if __name__ == "__main__":
    main()
