"""A runner whose ranks measure on simulated devices before they train on the CPU."""

from __future__ import annotations

import os

from d2scale.d2go.runner import Runner
from d2scale.detectron2 import memory
from d2scale.memory.devices import SimulatedDevice

memory._on_cuda = lambda cfg: True
memory._cuda_device = lambda: SimulatedDevice(int(os.environ["DEVICE_BYTES"]))
memory.TrainingMemory.generation = lambda training: 0


class MeasuringRunner(Runner):
    """Takes a CPU for a GPU of DEVICE_BYTES when memory is measured."""
