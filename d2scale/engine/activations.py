"""Activation checkpointing: computing again in the backward pass instead of keeping."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import nn

from d2scale.errors import ConfigError, Fault


@runtime_checkable
class Checkpointable(Protocol):
    """What a model offers that knows which of its activations are worth computing again."""

    def checkpoint_activations(self) -> None:
        """Keep fewer activations from now on; losses and gradients stay the same."""


def apply_activation_checkpointing(model: nn.Module) -> None:
    """Turn activation checkpointing on, in place.

    Raises:
        ConfigError: if the model does not offer it.
    """
    if not isinstance(model, Checkpointable):
        raise ConfigError(
            [
                Fault(
                    "D2SCALE.ACTIVATION_CHECKPOINTING",
                    True,
                    f"False, for {type(model).__name__} has no method checkpoint_activations()",
                    "turn it off, or use SOLVER.AMP.ENABLED to save memory",
                )
            ]
        )
    model.checkpoint_activations()
