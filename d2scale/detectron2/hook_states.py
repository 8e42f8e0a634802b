"""Undoing what hooks did in ``after_backward`` when their step is taken again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from d2scale.step.host_copies import HostCopies


class HookStates:
    """Keeps the state of the hooks that act in ``after_backward``, such as a moving average.

    They must act on the gradients of every attempt at a step, for they may change them, but what
    they count or average must count a step once. Kept are a hook's attributes, as far as they are
    replaced and not changed in place, and the values of its tensors, in the host's memory.

    Args:
        holders: the objects whose attributes are the hooks' state: mostly the hooks themselves.
    """

    def __init__(self, holders: Sequence[Any]) -> None:
        self._holders = holders
        self._attributes: list[dict[str, Any]] = []
        self._copies = HostCopies()

    def remember(self) -> None:
        """Copy the state."""
        self._attributes = [dict(vars(holder)) for holder in self._holders]
        self._copies.take(self._tensors())

    def restore(self) -> None:
        """Bring back what was remembered."""
        for holder, attributes in zip(self._holders, self._attributes, strict=True):
            vars(holder).clear()
            vars(holder).update(attributes)
        self._copies.bring_back()

    def _tensors(self) -> Iterator[Tensor]:
        for attributes in self._attributes:
            for value in attributes.values():
                values = value.values() if isinstance(value, dict) else [value]
                yield from (v for v in values if isinstance(v, Tensor))
