"""The state of a model that its forwards change: buffers, and plain attributes of its modules.

Batch norm keeps its statistics in buffers. detectron2's RetinaNet keeps its moving normalizer as a
number on the module, which is in no state dict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2scale.step import ranks
from d2scale.step.private_torch import buffer_owner, copy_all

# They are constants by definition, and half of all the tensors of a detector.
_CONSTANT = "FrozenBatchNorm2d"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
# Objects inside attributes are looked into so far for a state that cannot be held.
_DEPTH = 3


@dataclass(frozen=True)
class State:
    """Values of a model's buffers and changed attributes."""

    buffers: dict[str, Tensor] = field(default_factory=dict)
    # By module and name: what is new or other than when the model was built.
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_checkpoint(self) -> dict[str, Any]:
        """Return plain values and tensors on the CPU."""
        return {
            "buffers": {name: buffer.cpu() for name, buffer in self.buffers.items()},
            "attributes": {
                module: {name: _to_keep(value) for name, value in values.items()}
                for module, values in self.attributes.items()
            },
        }

    def with_checkpoint(self, kept: Mapping[str, Any]) -> State:
        """Return this state with the values that a checkpoint has kept in the place of its own."""
        buffers = {**self.buffers, **kept["buffers"]}
        return State(buffers, {module: dict(v) for module, v in kept["attributes"].items()})


class ModelState:
    """Takes copies of a model's state, and puts them back.

    To be built before the model's first forward: attributes are compared with those of now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # What torch ships changes only buffers.
        self._modules = [
            (name, module)
            for name, module in model.named_modules()
            if not type(module).__module__.startswith("torch.nn")
        ]
        self._built = [dict(vars(module)) for _, module in self._modules]

    @torch.no_grad()
    def take(self) -> State:
        """Return a copy of the state."""
        live = dict(self._buffers())
        copies = {name: torch.empty_like(buffer) for name, buffer in live.items()}
        copy_all(list(zip(copies.values(), live.values(), strict=True)))
        return State(copies, self._attributes())

    @torch.no_grad()
    def put(self, state: State) -> None:
        """Give the model a copy of ``state``; what a forward has added since is removed."""
        live = dict(self._buffers())
        pairs = []
        for name, value in state.buffers.items():
            buffer = live.pop(name, None)
            if buffer is not None and _alike(buffer, value):
                pairs.append((buffer, value))
            else:
                owner, own_name = buffer_owner(self._model, name)
                device = value.device if buffer is None else buffer.device
                owner[own_name] = value.detach().clone().to(device)
        copy_all(pairs)
        for name in live:  # such as a moving statistic that the first forward makes
            owner, own_name = buffer_owner(self._model, name)
            del owner[own_name]
        for (name, module), built in zip(self._modules, self._built, strict=True):
            _put_attributes(module, built, state.attributes.get(name, {}))

    @contextmanager
    def of_first_rank(self) -> Iterator[None]:
        """Within the context, the model has rank 0's state, as a checkpoint does; then its own.

        All ranks enter it.
        """
        if ranks.world_size() == 1:
            yield
            return
        own = self.take()
        self.put(own.with_checkpoint(ranks.broadcast_object(own.to_checkpoint())))
        try:
            yield
        finally:
            self.put(own)

    def fingerprint(self) -> dict[str, object]:
        """Return a value for each attribute whose content ``take`` does not copy.

        It changes with the content, as far as that consists of containers, numbers, tensors and
        objects that have attributes.
        """
        return {
            f"{name}.{key}".lstrip("."): _fingerprint(value, _DEPTH)
            for name, module in self._modules
            for key, value in _own_attributes(module)
            if not isinstance(value, Tensor) and not _is_plain(value)
        }

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        for name, module in self._model.named_modules():
            if type(module).__name__ != _CONSTANT:
                yield from module.named_buffers(name, recurse=False)

    def _attributes(self) -> dict[str, dict[str, Any]]:
        changed = {}
        for (name, module), built in zip(self._modules, self._built, strict=True):
            values = {
                key: value.detach().clone() if isinstance(value, Tensor) else value
                for key, value in vars(module).items()
                if _is_other(value, built.get(key, _NOTHING))
            }
            if values:
                changed[name] = values
        return changed


_NOTHING = object()


def _is_other(value: Any, built: Any) -> bool:
    """Return whether an attribute can be held and may have changed since the model was built."""
    if isinstance(value, Tensor):
        # Also the same tensor may have other values; one with a history is a cached result.
        return value.grad_fn is None
    return value is not built and _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _put_attributes(module: nn.Module, built: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    attributes = vars(module)
    for key in [key for key in attributes if key not in built and key not in wanted]:
        if _is_plain(attributes[key]) or isinstance(attributes[key], Tensor):
            del attributes[key]
    for key, value in built.items():
        if key not in wanted and attributes.get(key) is not value and _is_plain(value):
            attributes[key] = value
    for key, value in wanted.items():
        if not isinstance(value, Tensor):
            attributes[key] = value
        elif _alike(attributes.get(key), value):
            attributes[key].copy_(value)  # others may refer to it
        else:
            attributes[key] = value.clone()


def _alike(value: Any, other: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.grad_fn is None
        and (value.shape, value.dtype) == (other.shape, other.dtype)
    )


def _own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the attributes that torch has not given the module."""
    for key, value in vars(module).items():
        if key not in _OF_TORCH and not isinstance(value, nn.Module):
            yield key, value


_OF_TORCH = frozenset(vars(nn.Module()))


def _fingerprint(value: Any, depth: int) -> object:
    if isinstance(value, Tensor):
        return id(value), value._version
    if _is_plain(value):
        return value
    if depth == 0 or isinstance(value, nn.Module | type) or callable(value):
        return id(value)
    if isinstance(value, Mapping):
        return tuple((key, _fingerprint(part, depth - 1)) for key, part in value.items())
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().tolist())
    if hasattr(value, "tobytes"):  # an array
        return value.tobytes()
    if hasattr(value, "__dict__"):
        return _fingerprint(vars(value), depth)
    if hasattr(value, "__iter__") and hasattr(value, "__len__"):
        return tuple(_fingerprint(part, depth - 1) for part in value)
    return id(value)


def _to_keep(value: Any) -> Any:
    """Return a value as a checkpoint keeps it: of no class that loading would have to know."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, tuple):
        return tuple(map(_to_keep, value))
    if isinstance(value, np.generic):
        return value.item()
    kinds: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
    return next((kind(value) for kind in kinds if isinstance(value, kind)), value)
