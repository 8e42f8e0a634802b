"""Plans of recipes, on hardware that a test describes."""

from __future__ import annotations

from d2scale.config import load_recipe
from d2scale.planning.hardware import Hardware
from d2scale.planning.memory_profile import GIB, MemoryProfile, Phase
from d2scale.planning.plan import make_plan

PROFILE = MemoryProfile(
    (Phase("optimizer", 2 * GIB, 0), Phase("backward", GIB, GIB)), source="measured"
)


def plan_of(path, gpus, method=None, opts=(), **hardware):
    cfg, _ = load_recipe(str(path), opts)
    return make_plan(cfg, Hardware.from_cfg(cfg, gpus, **hardware), method=method)


def with_profile(path, gpus, method, budget_gib, opts=()):
    cfg, _ = load_recipe(str(path), opts)
    return make_plan(cfg, Hardware(gpus, budget_gib, PROFILE), method=method)
