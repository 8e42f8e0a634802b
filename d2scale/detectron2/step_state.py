"""What a checkpoint of detectron2 keeps of d2scale's steps: virtual ranks and place in the data."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from d2scale.detectron2.last_checkpoint import using
from d2scale.detectron2.private_upstream import checkpoint_periods, evaluation_periods
from d2scale.detectron2.user_errors import exit_together_on_user_error
from d2scale.planning.plan import Plan
from d2scale.run_folder.files import FINAL_CHECKPOINT
from d2scale.step import ranks
from d2scale.step.guard import MicroBatchSize
from d2scale.step.model_state import ModelState
from d2scale.step.virtual_ranks import VirtualRanks

logger = logging.getLogger(__name__)

# Its key in a checkpoint.
STEP_STATE = "d2scale_steps"


class StepState:
    """The state of the steps that neither model nor optimizer hold; a checkpointer saves it.

    detectron2 saves on rank 0 alone, and virtual ranks live on all of them. So :meth:`gather` is to
    be called on every rank, before a checkpoint is saved. To be built before the first forward.

    Args:
        model: bare.
        virtual_ranks: None: each rank is only itself, and rank 0's attributes are kept.
    """

    def __init__(self, model: nn.Module, virtual_ranks: VirtualRanks | None = None) -> None:
        self.virtual_ranks = virtual_ranks
        self.place: Mapping[str, Any] | None = None  # in the data, after the last complete step
        self._size: MicroBatchSize | None = None  # of the step, once that is built
        self._loaded_size: Mapping[str, Any] | None = None  # its state, of a checkpoint
        self._model_state = ModelState(model)
        self._gathered: dict[str, Any] | None = None

    def keep_size(self, size: MicroBatchSize) -> None:
        """Keep the ``size`` of the step's micro-batches too, and set it as a checkpoint says."""
        self._size = size
        if self._loaded_size is not None:
            with exit_together_on_user_error(), using("micro_batches of the checkpoint"):
                size.load_state_dict(self._loaded_size)

    def gather(self) -> None:
        """Collect the states of the virtual ranks on rank 0. All ranks call it."""
        if self.virtual_ranks is not None:
            self._gathered = self.virtual_ranks.state_dict()

    def forget(self) -> None:
        """Begin another step: what was gathered is of the one before."""
        self._gathered = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state; without :meth:`gather` that of rank 0's first virtual rank alone."""
        states = self._gathered
        if states is None:
            if self.virtual_ranks is not None:
                logger.warning(
                    "This checkpoint is saved where d2scale did not expect one: it holds the state "
                    "of the first virtual rank, which all begin with when it is resumed"
                )
            own = {**self._model_state.take().to_checkpoint(), "buffers": {}}
            states = {"states": [own]}
        size = self._size.state_dict() if self._size is not None else None
        return {"virtual_ranks": states, "place": self.place, "micro_batches": size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self.place = state["place"]
        self._loaded_size = state.get("micro_batches")  # older checkpoints have none
        if self.virtual_ranks is not None:
            self.virtual_ranks.load_state_dict(state["virtual_ranks"])
        else:
            first = {**state["virtual_ranks"]["states"][0], "buffers": {}}
            self._model_state.put(self._model_state.take().with_checkpoint(first))

    def of_first_rank(self) -> AbstractContextManager[None]:
        """Return a context manager in which every rank's model has the state of rank 0's."""
        return self._model_state.of_first_rank()


class FinalCheckpointHook(HookBase):
    """Saves ``model_final.pth`` for a training that resumed with no step left.

    It was killed after its last step, before the final checkpoint was whole.
    """

    def __init__(self, checkpointer: Any, state: StepState | None) -> None:
        self._checkpointer = checkpointer
        self._state = state

    def after_train(self) -> None:
        trainer = self.trainer
        if min(trainer.iter, trainer.start_iter) < trainer.max_iter:
            return
        last = Path(self._checkpointer.get_checkpoint_file()).name
        if ranks.broadcast_object(last) == FINAL_CHECKPOINT:
            return
        if self._state is not None:
            self._state.gather()
        # A DefaultTrainer keeps the last iteration that it has finished: the loop counted on.
        after, trainer.iter = trainer.iter, trainer.max_iter - 1
        self._checkpointer.save(FINAL_CHECKPOINT.removesuffix(".pth"), iteration=trainer.iter)
        trainer.iter = after


class StateHook(HookBase):
    """Gathers the state where checkpoints are due, and evaluates what a checkpoint holds.

    It stands before the hooks that save and evaluate.

    Args:
        periods: in which checkpoints are saved, besides those of detectron2's hooks.
    """

    def __init__(self, state: StepState, periods: Iterable[int] = ()) -> None:
        self._state = state
        self._saves = {*periods}
        self._evaluates: set[int] = set()
        self._sharing = ExitStack()  # while all ranks have rank 0's state

    def before_train(self) -> None:
        # Rank 0 alone has the hooks that save. What evaluates may save the best.
        evaluates = evaluation_periods(self.trainer)
        saves = {*self._saves, *checkpoint_periods(self.trainer), *evaluates}
        self._saves, self._evaluates = ranks.broadcast_object((saves, evaluates))

    def before_step(self) -> None:
        self._sharing.close()
        self._state.forget()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or _is_due(done, self._saves):
            self._state.gather()
        if done != self.trainer.max_iter and _is_due(done, self._evaluates):
            self._begin_sharing()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._begin_sharing()

    def _begin_sharing(self) -> None:
        self._sharing.enter_context(self._state.of_first_rank())


def build_step_state(cfg: Any, plan: Plan | None, model: nn.Module) -> StepState:
    """Return the state of the steps of ``cfg``, with the plan's virtual ranks. All ranks call it.

    ``model`` is bare, before its first forward.
    """
    if plan is None or not plan.virtual_ranks:
        return StepState(model)
    # The system's, for the seed must not depend on the seeds of others.
    drawn = int.from_bytes(os.urandom(3), "big")
    virtual_ranks = VirtualRanks(
        model,
        plan.virtual_ranks,
        ranks.broadcast_object(drawn if cfg.SEED < 0 else cfg.SEED),
        ordered=cfg.D2SCALE.ORDERED_SUM,
        around=partial(_turn, ordered=cfg.D2SCALE.ORDERED_SUM),
        refuses=cfg.D2SCALE.VIRTUAL_RANKS == "on",
    )
    return StepState(model, virtual_ranks)


@contextmanager
def _turn(virtual_rank: int, *, ordered: bool) -> Iterator[None]:
    """Within the context, what the model writes is thrown away, but for virtual rank 0's.

    A cluster writes that of its rank 0.
    """
    # torch compiles a scripted loss, such as RetinaNet's, after its first run, and then it rounds
    # otherwise: which virtual rank is the first of a process would show.
    compiled = torch.jit.optimized_execution(False) if ordered else nullcontext()
    events = EventStorage(get_event_storage().iter) if virtual_rank else nullcontext()
    with compiled, events:
        yield


def _is_due(done: int, periods: Iterable[int]) -> bool:
    return any(period > 0 and done % period == 0 for period in periods)
