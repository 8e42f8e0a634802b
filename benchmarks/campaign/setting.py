"""Where a slice of the campaign runs: on a GPU, or on a CPU that pretends, to try the code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from contestants import NARROW

from d2scale.coco.catalog import ROOT_VARIABLE, datasets_root
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.config import load_cfg
from d2scale.memory.devices import CudaDevice, Device, SimulatedDevice, hold_to_budget

REPOSITORY = Path(__file__).resolve().parents[2]
PUBLISHED = "d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml"
Row = dict[str, Any]
T = TypeVar("T")

# Random weights need a norm that learns, unless only time and memory count.
_TRAINABLE = ("MODEL.RESNETS.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", "0")
# Shrinks the recipe to seconds on a CPU.
_TINY = (
    *NARROW,
    *("INPUT.MIN_SIZE_TRAIN", "(64, 72)", "INPUT.MAX_SIZE_TRAIN", "96"),
    *("INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96"),
    *("DATALOADER.NUM_WORKERS", "0"),
)
_SIMULATED_BYTES = 48 * 2**20


@dataclass(frozen=True)
class Setting:
    """What a slice is given."""

    device: torch.device
    memory: Device  # that device, or a CPU with a limit on the bytes of its tensors
    folder: Path  # for run folders and other files that are not kept
    dry: bool  # everything shrunk to seconds; the figures mean nothing

    @classmethod
    def on_gpu(cls, folder: Path, card_gib: float | None = None) -> Setting:
        """The first GPU of this machine, of which this process may take ``card_gib``."""
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
        memory = CudaDevice(device)
        hold_to_budget(device, card_gib or 0.0)
        return cls(device, memory, folder, dry=False)

    @classmethod
    def dry_run(cls, folder: Path) -> Setting:
        """A CPU in place of the GPU."""
        memory = SimulatedDevice(_SIMULATED_BYTES)
        return cls(memory.device, memory, folder, dry=True)

    def few(self, count: T, dry: T) -> T:
        """Return ``count``, or a number for a dry run."""
        return dry if self.dry else count

    def opts(self, *changes: object, trains: bool = False) -> list[str]:
        """Return settings of a recipe of MetaFCOS for this device, with random weights."""
        opts = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", self.device.type]
        opts += _TRAINABLE if trains else ()
        opts += _TINY if self.dry else ()
        return [*opts, *map(str, changes)]

    def cfg(self, *changes: object, recipe: str = PUBLISHED, trains: bool = False) -> Any:
        """Return the config of a recipe with :meth:`opts`."""
        return load_cfg(recipe, self.opts(*changes, trains=trains))

    def use_datasets(self) -> str:
        """Let dataset names resolve: to COCO where it is, else to drawn shapes; say which."""
        if not self.dry and (datasets_root() / "coco" / "annotations").is_dir():
            return "COCO images"
        root = self.folder / "shapes"
        size = self.few((480, 640), (64, 96))
        write_shapes_dataset(root, self.few(256, 40), self.few(64, 2), image_size=size)
        os.environ[ROOT_VARIABLE] = str(root.absolute())
        return "drawn shapes"

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Slice:
    """A part of the campaign that runs in one process, in under ten minutes."""

    name: str
    minutes: float  # that it is expected to take
    run: Callable[[Setting], Iterator[Row]]  # yields a row, with a "key", as soon as it is made
    environment: tuple[tuple[str, str], ...] = ()  # for its process

    @property
    def text(self) -> str:
        """What it proves."""
        function = getattr(self.run, "func", self.run)
        return (function.__doc__ or "").strip().partition("\n")[0]
