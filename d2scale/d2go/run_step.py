"""d2scale's optimizer step in the place of d2go's own, with d2go's EMA and wrappers."""

from __future__ import annotations

from typing import Any

import torch
from d2go.utils.abnormal_checker import AbnormalLossCheckerWrapper

from d2scale.d2go.memory import ENGINE
from d2scale.d2go.private_upstream import set_ema_decay, state_holders
from d2scale.d2go.step import build_step
from d2scale.detectron2.private_upstream import FULLY_SHARDED
from d2scale.detectron2.run_step import RunStep
from d2scale.step.optimizer_step import OptimizerStep


class D2GoRunStep(RunStep):
    """Gives d2go's trainer another ``run_step``.

    By the gain rule d2go's EMA is updated once an iteration, with the recipe's decay; after a
    backward (MODEL_EMA.AFTER_BACKWARD) once a step, with the decay to the power of its gain.
    """

    engine = ENGINE
    always = False  # d2go's own step trains as well
    wrappers = (*FULLY_SHARDED, AbnormalLossCheckerWrapper)

    def build_step(self, **options: Any) -> OptimizerStep:
        return build_step(self._cfg, self.inner.model, self.inner.optimizer, **options)

    def state_holders(self) -> list[Any]:
        return state_holders(self.inner)

    def follow_gain(self, gain: float) -> None:
        # Between backward and update it is updated once a step, not once an iteration.
        set_ema_decay(self.inner, self._cfg.MODEL_EMA.DECAY**gain)


def can_take_steps(cfg: Any, model: torch.nn.Module | None = None) -> bool:
    """Return whether :class:`D2GoRunStep` can take the steps of d2go's own trainer of ``model``.

    Without a ``model``, of one that is not built yet and that nothing shards.
    """
    amp_without_cuda = cfg.SOLVER.AMP.ENABLED and not torch.cuda.is_available()
    watched = cfg.ABNORMAL_CHECKER.ENABLED
    return not (amp_without_cuda or watched or isinstance(model, FULLY_SHARDED))
