"""The names of the scaling methods, and which one a config asks for."""

from __future__ import annotations

from collections.abc import Sequence

from d2scale.config.value_rules import Rule
from d2scale.errors import ConfigError, Fault

METHODS = ("per_gpu", "keep_total", "max_memory")
METHOD_PREFIX = "d2scale_"
D2GO_METHODS = ("default_scale_d2_configs", "default_scale_quantization_configs")

_OWN_METHODS = tuple(METHOD_PREFIX + method for method in METHODS)

METHOD_NAMES = Rule(
    "SOLVER.AUTO_SCALING_METHODS",
    f"one of {', '.join(_OWN_METHODS)}, or d2go's {', '.join(D2GO_METHODS)}",
    lambda names: {*names} <= {*_OWN_METHODS, *D2GO_METHODS},
    "correct the name",
)


def method_faults(scaling_methods: Sequence[str]) -> list[Fault]:
    """Return what is wrong with ``SOLVER.AUTO_SCALING_METHODS``."""
    faults = METHOD_NAMES.faults(scaling_methods)
    if not faults and len(scaling_methods) > 1 and not {*scaling_methods} <= {*D2GO_METHODS}:
        advice = "keep one: each scales the whole schedule, two would scale it twice"
        allowed = "one d2scale method, alone"
        return [Fault(METHOD_NAMES.key, scaling_methods, allowed, advice)]
    return faults


def method_of(scaling_methods: Sequence[str]) -> str:
    """Return the scaling method that ``SOLVER.AUTO_SCALING_METHODS`` asks for.

    d2go's own methods mean ``per_gpu``; an empty list means ``keep_total``.

    Raises:
        ConfigError: for a name that is not known, or a list that would scale twice.
    """
    if faults := method_faults(scaling_methods):
        raise ConfigError(faults)
    if not scaling_methods:
        return "keep_total"
    name = scaling_methods[0]
    return "per_gpu" if name in D2GO_METHODS else name.removeprefix(METHOD_PREFIX)
