"""Private parts of d2go that the runner uses, in one place.

``tests/d2go/test_private_upstream.py`` names the versions that they were tried with. Besides,
``Runner`` overrides ``_get_trainer_hooks``, for which d2go has no public name.
"""

from __future__ import annotations

from typing import Any

from d2go.modeling.ema import EMAHook
from detectron2.engine import SimpleTrainer

from d2scale.detectron2.private_upstream import hooks_after_backward


def state_holders(trainer: SimpleTrainer) -> list[Any]:
    """Return the objects whose attributes are the state of hooks that act after a backward.

    They are the hooks themselves, and parts of the EMA if it acts there.
    """
    holders: list[Any] = []
    for hook in hooks_after_backward(trainer):
        if not isinstance(hook, EMAHook):
            holders.append(hook)
        elif hook.is_after_backward:
            holders += [hook, hook.ema_updater, hook.ema]
    return holders


def set_ema_decay(trainer: SimpleTrainer, decay: float) -> None:
    """Set the decay of the EMA that is updated between backward and update, if there is one."""
    for hook in hooks_after_backward(trainer):
        if isinstance(hook, EMAHook) and hook.is_after_backward:
            hook.ema_updater.decay = decay
