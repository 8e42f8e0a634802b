"""Measuring the noise of a gradient from the parts that a step consists of anyway.

A step's gradient is the sum of what its n parts (ranks times micro-batches) contribute, G = c_1 +
... + c_n, part i from b_i of the B images. With w_i = b_i / B, unbiased for uneven parts too::

    V  = B * (sum_i |c_i|^2 / w_i - |G|^2) / (n - 1)
    M2 = |G|^2 - V / B

V is the trace of the covariance of one image's gradient, M2 the squared norm of the true gradient
(McCandlish et al., arXiv 1812.06162, appendix A.1, has it for even parts).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from d2scale.planning import gain
from d2scale.step.private_torch import norms_of

# What an average remembers of the measurement before.
DECAY = 0.9


@dataclass(frozen=True)
class GradientNoise:
    """Noise and signal of one image's gradient: measured in a step, or averaged over steps."""

    variance: float  # trace of its covariance (V)
    signal: float  # squared norm of its mean (M2); as an estimate it may be negative

    @classmethod
    def of_parts(
        cls, weighted_squares: float, total_square: float, *, parts: int, images: int
    ) -> GradientNoise | None:
        """Return what a step has measured, None if that is nothing.

        Args:
            weighted_squares: sum over the parts of the squared norm of their contribution, over
                their share of the images.
            total_square: squared norm of the step's gradient.
            parts: of the step, over all ranks.
            images: of the step.
        """
        measured = math.isfinite(weighted_squares) and math.isfinite(total_square)
        if parts < 2 or not measured or weighted_squares <= 0:
            return None
        # Never negative but for rounding.
        variance = images * max(weighted_squares - total_square, 0.0) / (parts - 1)
        return cls(variance, total_square - variance / images)

    @property
    def scale(self) -> float:
        """The noise scale, in images; infinite if there is no signal."""
        return gain.noise_scale(self.variance, self.signal)


@dataclass(frozen=True)
class NoiseAverage:
    """An exponential average of measurements, of V and M2 and not of what follows from them."""

    variance_sum: float = 0.0
    signal_sum: float = 0.0
    weight: float = 0.0  # of all measurements together; 0: there is none
    decay: float = DECAY

    def updated(self, noise: GradientNoise | None) -> NoiseAverage:
        """Return the average with one more measurement."""
        if noise is None:
            return self
        keep, add = self.decay, 1 - self.decay
        return NoiseAverage(
            keep * self.variance_sum + add * noise.variance,
            keep * self.signal_sum + add * noise.signal,
            keep * self.weight + add,
            self.decay,
        )

    @property
    def value(self) -> GradientNoise | None:
        """The average, None before the first measurement."""
        if not self.weight:
            return None
        return GradientNoise(self.variance_sum / self.weight, self.signal_sum / self.weight)

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {
            "variance_sum": self.variance_sum,
            "signal_sum": self.signal_sum,
            "weight": self.weight,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, float], decay: float = DECAY) -> NoiseAverage:
        """Return the average that a checkpoint has kept."""
        sums = float(state["variance_sum"]), float(state["signal_sum"])
        return cls(*sums, float(state["weight"]), decay)


class SquaredNorms:
    """Adds up squared norms of gradients as backward passes complete them, without a copy."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)

    @contextmanager
    def of_backward(self, *, watch: bool = True) -> Iterator[list[Tensor]]:
        """Within the context, which is one backward pass, put norms into the list that it yields.

        Without ``watch`` it stays empty.

        A hook on a leaf sees the sum of this pass alone, before it is added to ``.grad``, also
        where a parameter is used several times.
        """
        norms: list[Tensor] = []
        completed: set[int] = set()
        hooks = [
            parameter.register_hook(partial(_add_norm, norms, completed, index))
            for index, parameter in enumerate(self._parameters if watch else ())
            if parameter.requires_grad  # some are frozen while training
        ]
        try:
            yield norms
        finally:
            for hook in hooks:
                hook.remove()

    def of_gradients(self) -> Tensor:
        """Return the squared norm of all gradients together, float64."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if any(_is_half(gradient) for gradient in gradients):
            return self.total([_norm(gradient) for gradient in gradients])
        return self.total(norms_of(gradients))

    def total(self, norms: Sequence[Tensor]) -> Tensor:
        """Return the sum of the squares of ``norms``, float64, on the parameters' device."""
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        return torch.stack(list(norms)).double().square().sum()


def _add_norm(norms: list[Tensor], completed: set[int], index: int, gradient: Tensor) -> None:
    norms.append(_norm(gradient))
    if index in completed:
        # Reentrant activation checkpointing completes a gradient in pieces: their squares do not
        # add up to its own, so such a step measures nothing.
        norms.append(torch.full_like(norms[-1], math.nan))
    completed.add(index)


def _norm(gradient: Tensor) -> Tensor:
    # A norm in half precision would overflow.
    dtype = torch.float32 if _is_half(gradient) else None
    return torch.linalg.vector_norm(gradient.detach(), dtype=dtype)


def _is_half(gradient: Tensor) -> bool:
    return gradient.dtype.itemsize < 4
