"""A d2go runner whose model runs out of memory, importable by ``d2go.train_net --runner``."""

from __future__ import annotations

import os

import detectron2.utils.comm as comm

from d2scale import Runner
from d2scale.step.out_of_memory import OutOfMemoryError


class FailingRunner(Runner):
    """Fails in training forwards as the environment says.

    FAIL_FROM is the forward of a rank from which on it fails, FAIL_IMAGES the fewest images that
    are too many, FAIL_RANK the rank.
    """

    def build_model(self, cfg, eval_only=False):
        model = super().build_model(cfg, eval_only)
        forward, calls = model.forward, []
        first, images, rank = (int(os.environ[f"FAIL_{key}"]) for key in ("FROM", "IMAGES", "RANK"))

        def failing(batch, *args, **kwargs):
            calls.append(len(batch))
            fails = len(calls) > first and len(batch) >= images and comm.get_rank() == rank
            if model.training and fails:
                raise OutOfMemoryError("out of memory")
            return forward(batch, *args, **kwargs)

        model.forward = failing
        return model
