"""Restoring what a step changes: weights, optimizer, buffers, scaler and random states."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from d2scale.step.host_copies import HostCopies
from d2scale.step.model_state import ModelState, State
from d2scale.step.private_torch import copy_all, scaler_values

# What a scaler sets on a fused optimizer for its step, and takes away after one that succeeds. Left
# there, a scale would be multiplied by itself, or divide gradients that are unscaled already.
_LEFT_BY_SCALER = ("grad_scale", "found_inf")


class StepUndo:
    """Copies what a step changes, and restores it after a step that failed.

    An optimizer that fails has updated some weights and not others, so weights and optimizer
    state are copied at the start of every step: to host memory, for the device has none to spare,
    and on a CUDA stream of their own, while the forward only reads them. What forwards change
    (statistics of batch norm, moving normalizers) is small and copied on the device.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: GradScaler | None = None
    ) -> None:
        self._optimizer = optimizer
        self._scaler = scaler
        self._device = next(model.parameters()).device
        self._on_cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if self._on_cuda else None
        self._copies = HostCopies()
        self._state: dict[Any, dict[str, Any]] = {}
        self.model_state = ModelState(model)
        self._kept_state = State()
        self._random: list[Tensor] = []
        self._scaler_values: list[Tensor] = []
        self._complete = False

    def forget(self) -> None:
        """Begin a new step: the copies are of the one before."""
        self._complete = False

    @torch.no_grad()
    def remember(self) -> None:
        """Copy what the coming step may change, once a step."""
        if self._complete:
            return
        self._random = [torch.get_rng_state()]
        if self._on_cuda:
            self._random.append(torch.cuda.get_rng_state(self._device))
        values = scaler_values(self._scaler) if self._scaler else []
        self._scaler_values = [value.clone() for value in values]
        self._kept_state = self.model_state.take()
        self._state = {key: dict(state) for key, state in self._optimizer.state.items()}
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with self._beside():
            self._copies.take(self._changing())
        self._complete = True

    def settle(self) -> None:
        """Wait, on the device, until the copies are made. To be called before the update."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @torch.no_grad()
    def restore(self) -> None:
        """Drop what the step has left behind, free its memory, and restore the copies."""
        self._optimizer.zero_grad(set_to_none=True)
        for name in _LEFT_BY_SCALER:
            vars(self._optimizer).pop(name, None)
        if not self._complete:  # failed before anything could change
            free_memory()
            return
        self._optimizer.state.clear()  # with what this step has made of it
        free_memory()  # first: restoring takes a little memory itself
        self.settle()
        self._copies.bring_back()
        self._optimizer.state.update({key: dict(state) for key, state in self._state.items()})
        self.model_state.put(self._kept_state)
        self._restore_scaler()
        torch.set_rng_state(self._random[0])
        if self._on_cuda:
            torch.cuda.set_rng_state(self._random[1], self._device)

    def _beside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _changing(self) -> list[Tensor]:
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        values = (value for state in self._state.values() for value in state.values())
        return parameters + [value for value in values if isinstance(value, Tensor)]

    def _restore_scaler(self) -> None:
        if self._scaler is None or not self._scaler_values:
            return
        # It forgets what unscale_() has noted for the step that is undone.
        self._scaler.update(self._scaler_values[0])
        copy_all(list(zip(scaler_values(self._scaler), self._scaler_values, strict=True)))


def free_memory() -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()  # frames in reference cycles keep activations alive
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
