"""A runner whose ranks train on a simulated device: tensors are counted and refused beyond it."""

from __future__ import annotations

import logging
from typing import Any

import torch

from d2scale.d2go.runner import Runner
from d2scale.memory.tracker import StorageTracker
from d2scale.planning.memory_profile import GIB

logger = logging.getLogger(__name__)


class LimitedRunner(Runner):
    """Trains within the budget that the plan was made for, and logs how much of it was used."""

    def do_train(self, cfg: Any, model: torch.nn.Module, resume: bool) -> Any:
        """Train under a tracker that raises torch's out-of-memory error."""
        tracker = StorageTracker(int(cfg.D2SCALE.MEMORY.BUDGET_GIB * GIB))
        with tracker:
            tracker.count(*model.parameters(), *model.buffers())
            results = super().do_train(cfg, model, resume)
        logger.warning("Most bytes on the simulated device: %.3f GiB", tracker.peak_bytes / GIB)
        return results
