"""The ranks of the recipe's cluster, several of which one GPU runs in turn.

Each rank of a cluster computes its losses from its own images, with its own batch norm statistics,
its own moving normalizers and its own random stream, and the gradients are averaged. A GPU that
runs some of those ranks one after another takes their part of the same step, whatever the model.
(Virtual nodes: VirtualFlow, arXiv 2009.09523; EasyScale, arXiv 2208.14228.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from d2scale.errors import ConfigError, Fault
from d2scale.planning.rules import VIRTUAL_RANKS, own_virtual_ranks, split_evenly
from d2scale.step import ranks
from d2scale.step.model_state import ModelState, State
from d2scale.step.norms import synchronised_norms
from d2scale.step.random_stream import random_stream

logger = logging.getLogger(__name__)

Around = Callable[[int], AbstractContextManager[object]]


class VirtualRanks:
    """Runs this process's share of the recipe's ranks in turn, each with a state of its own.

    To be built before the model's first forward. Between steps the model has the state of the
    first virtual rank here: on rank 0 virtual rank 0's, which a cluster evaluates and saves.

    Args:
        model: bare, without synchronised batch norm.
        count: ranks of the recipe (N0), at least as many as there are ranks.
        seed: of the random streams, the same on all ranks.
        ordered: add the gradients in the order of the virtual ranks, so that the sum does not
            depend on the number of ranks, bit by bit. On several ranks that takes a copy of the
            gradients for each virtual rank, and a broadcast of each in place of one all-reduce.
        around: makes a context manager for the run of a virtual rank, by its number.
        refuses: raise for a state that cannot be held apart, where otherwise a warning names it.
    """

    def __init__(
        self,
        model: nn.Module,
        count: int,
        seed: int,
        *,
        ordered: bool = False,
        around: Around | None = None,
        refuses: bool = False,
    ) -> None:
        if synchronised_norms(model):
            raise ValueError("synchronised batch norm couples the virtual ranks")
        self.count = count
        self.own = own_virtual_ranks(count, ranks.rank(), ranks.world_size())
        self.ordered = ordered
        self.seed = seed  # a resumed run has that of its beginning
        self._around = around
        self._refuses = refuses
        self._state = ModelState(model)
        self._states: dict[int, State] = {}
        self._new_states: dict[int, State] = {}  # of a step that is not complete
        self._loaded: Sequence[Mapping[str, Any]] | None = None
        self._step_number = 0
        # What the first turn has made, only the second can change.
        self._turns_to_check = 2

    def begin(self, step_number: int) -> None:
        """Begin an attempt at a step, whose random streams are those of ``step_number``."""
        self._step_number = step_number
        self._new_states = {}
        self._begin_states()

    def leave_first(self) -> None:
        """Give the model the new state of the first virtual rank, once all of them have run.

        What acts between backward and update (an average of weights and buffers) shall see it.
        """
        self._state.put(self._new_states[self.own.start])

    def end(self) -> None:
        """Keep what the attempt has made of the states; it has succeeded on all ranks."""
        self._states.update(self._new_states)
        self._new_states = {}

    @contextmanager
    def running(self, number: int) -> Iterator[None]:
        """Within the context, which holds forward and backward, be virtual rank ``number``."""
        self._state.put(self._states[number])
        before = self._state.fingerprint() if self._turns_to_check else None
        with random_stream(self.seed, self._step_number, number):
            if self._around is None:
                yield
            else:
                with self._around(number):
                    yield
        self._new_states[number] = self._state.take()
        if before is not None:
            self._turns_to_check -= 1
            self._check(before, self._state.fingerprint())

    def cut(self, rank_batch: Sequence[Any], ims_per_gpu: int) -> list[tuple[int, list[Any]]]:
        """Cut a rank's images into micro-batches, each with the virtual rank that it belongs to.

        Every virtual rank has the same number of images, at most ``ims_per_gpu`` at a time.
        """
        images, rest = divmod(len(rank_batch), len(self.own))
        if rest or not images:
            raise ValueError(
                f"{len(rank_batch)} images cannot be {len(self.own)} virtual ranks of equal size"
            )
        samples = iter(rank_batch)
        sizes = split_evenly(images, -(-images // ims_per_gpu))
        return [(number, list(islice(samples, size))) for number in self.own for size in sizes]

    def state_dict(self) -> dict[str, Any]:
        """Return seed and states of all virtual ranks on rank 0, and an empty one elsewhere.

        All ranks call it.
        """
        self._begin_states()
        own = [self._states[number].to_checkpoint() for number in self.own]
        gathered = ranks.gather_on_first_rank(own)
        if gathered is None:
            return {}
        states = [state for of_rank in gathered for state in of_rank]
        return {"seed": self.seed, "states": _without_common_buffers(states)}

    def load_state_dict(self, kept: Mapping[str, Any]) -> None:
        """Take the states of a checkpoint whose model is loaded, before or after this call.

        Of another number of virtual ranks every one takes the first's.
        """
        # A run without virtual ranks has kept one state and no seed.
        self.seed, states = int(kept.get("seed", self.seed)), kept["states"]
        if len(states) != self.count:
            logger.warning(
                "The checkpoint has the states of %d virtual ranks, the run has %d: all of them "
                "begin with the state of the first",
                *(len(states), self.count),
            )
            states = [states[0]] * self.count
        self._loaded, self._states = states, {}

    def held_tensors(self) -> list[Tensor]:
        """Return the buffers of the virtual ranks that wait for their turn."""
        return [buffer for state in self._states.values() for buffer in state.buffers.values()]

    def _begin_states(self) -> None:
        """Let the first virtual rank take the model as it is now, and new ones begin there."""
        live = self._state.take()
        if not self._states:
            kept = self._loaded
            for number in self.own:
                state = live if kept is None else live.with_checkpoint(kept[number])
                self._states[number] = state
        else:
            self._states[self.own.start] = live
        self._loaded = None

    def _check(self, before: Mapping[str, object], after: Mapping[str, object]) -> None:
        names = [name for name, value in after.items() if before.get(name, value) != value]
        if not names:
            return
        self._turns_to_check = 0
        what = f"state outside of buffers, numbers and tensors: {', '.join(names)}"
        if self._refuses:
            allowed = f"off for a model that keeps {what}"
            advice = "it cannot be held apart: keep it in buffers, or take auto or off"
            raise ConfigError([Fault(VIRTUAL_RANKS, "on", allowed, advice)])
        logger.warning(
            "The virtual ranks of a GPU share what this model keeps as %s. If that is more than a "
            "cache, the training is not exactly the recipe's",
            what,
        )


def _without_common_buffers(states: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the states without buffers that are the same everywhere: the model has those."""
    first = states[0]["buffers"]
    own = {
        name
        for state in states
        for name, buffer in state["buffers"].items()
        if name not in first or not torch.equal(buffer, first[name])
    }
    return [
        {**state, "buffers": {k: v for k, v in state["buffers"].items() if k in own}}
        for state in states
    ]
