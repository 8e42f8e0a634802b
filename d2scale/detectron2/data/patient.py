"""Loaders of torch, detectron2 and d2go that neither a full /dev/shm nor a worker can hang."""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from d2scale.launch.children import begin_worker
from d2scale.launch.workers import (
    TOLD_AFTER_SECONDS,
    check_room_for,
    patiently,
    share,
    tell_of_full_shm,
)

# D2SCALE.LOADER_TIMEOUT_SECONDS where no config has it.
LOADER_SECONDS = 600.0


class PatientLoader:
    """A loader whose workers share memory where there is room, and are never awaited in silence.

    torch's queue shares tensors in a thread whose errors nobody sees, so with a full /dev/shm its
    reader would wait for ever. Here a worker shares them itself; what finds no room goes through
    the queue's pipe.

    Args:
        loader: of torch, with worker processes; it is not changed.
        timeout_seconds: for which a batch is waited for, unless the loader has its own limit.
    """

    def __init__(self, loader: DataLoader[Any], timeout_seconds: float) -> None:
        self._timeout_seconds = loader.timeout or timeout_seconds
        self._loader = copy.copy(loader)
        self._loader.timeout = TOLD_AFTER_SECONDS
        self._loader.collate_fn = _Packing(loader.collate_fn)
        begin = partial(begin_worker, os.getpid(), loader.worker_init_fn)
        self._loader.worker_init_fn = begin

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not there yet, where this is copied
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[Any]:
        check_room_for(self._loader.num_workers)
        # Workers start now. No name for their iterator: a traceback would keep them alive.
        return _opened(patiently(iter(self._loader), self._timeout_seconds))


def patient(loader: Any, timeout_seconds: float) -> Any:
    """Return a loader with worker processes as a PatientLoader, and any other as it is.

    Within what detectron2 and d2go wrap around a loader, the loader is replaced.
    """
    if isinstance(loader, DataLoader):
        return PatientLoader(loader, timeout_seconds) if loader.num_workers else loader
    for name in ("data_loader", "dataset"):
        if (inner := getattr(loader, "__dict__", {}).get(name)) is not None:
            setattr(loader, name, patient(inner, timeout_seconds))
    return loader


def _opened(parcels: Iterator[_Parcel]) -> Iterator[Any]:
    told = False
    for parcel in parcels:
        if not parcel.is_shared and not told:
            told = True
            tell_of_full_shm()
        yield parcel.open()


class _Parcel:
    """What a worker has made: its tensors, in shared memory, and all else as bytes."""

    def __init__(self, value: Any) -> None:
        file = io.BytesIO()
        packer = _Packer(file)
        packer.dump(value)
        self._content, self._tensors = file.getvalue(), packer.tensors
        self.is_shared = packer.is_shared

    def pin_memory(self) -> _Parcel:
        """Move the tensors to page-locked memory (called by torch's data loader)."""
        self._tensors = [tensor.pin_memory() for tensor in self._tensors]
        return self

    def open(self) -> Any:
        return _Opener(io.BytesIO(self._content), self._tensors).load()


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self.is_shared = True

    def persistent_id(self, value: Any) -> int | None:
        """Return the place of a tensor that is in shared memory now; None: it becomes bytes."""
        if type(value) is not torch.Tensor or value.device.type != "cpu" or not value.numel():
            return None
        if not share(value):
            self.is_shared = False
            return None
        self.tensors.append(value.detach())
        return len(self.tensors) - 1


class _Opener(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: Any) -> torch.Tensor:
        return self._tensors[place]


class _Packing:
    """Packs what a loader's own function collates. A class: spawned workers get it by pickle."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, samples: Any) -> Any:
        return _Parcel(self._collate(samples))
