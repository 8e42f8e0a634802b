"""Activation checkpointing: compute activations again in the backward pass, to save memory."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from d2scale.errors import ConfigError, Fault


@runtime_checkable
class Checkpointable(Protocol):
    """A model that can compute some of its activations again instead of keeping them."""

    def checkpoint_activations(self) -> None:
        """Keep fewer activations from now on; losses and gradients stay the same."""


def apply_activation_checkpointing(model: nn.Module) -> None:
    """Turn activation checkpointing on, in place; ConfigError if the model does not offer it."""
    if not isinstance(model, Checkpointable):
        allowed = f"False, for {type(model).__name__} has no method checkpoint_activations()"
        advice = "turn it off, or use SOLVER.AMP.ENABLED to save memory"
        raise ConfigError([Fault("D2SCALE.ACTIVATION_CHECKPOINTING", True, allowed, advice)])
    model.checkpoint_activations()
