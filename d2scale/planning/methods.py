"""The names of the scaling methods, and which one a config asks for."""

from __future__ import annotations

from collections.abc import Sequence

from d2scale.errors import ConfigError, Fault

METHODS = ("per_gpu", "keep_total", "max_memory")
METHOD_PREFIX = "d2scale_"
D2GO_METHODS = ("default_scale_d2_configs", "default_scale_quantization_configs")


def method_of(scaling_methods: Sequence[str]) -> str:
    """Return the scaling method that ``SOLVER.AUTO_SCALING_METHODS`` asks for.

    d2go's own methods mean ``per_gpu``; an empty list means ``keep_total``.

    Raises:
        ConfigError: for a name that is not known, or a list that would scale twice.
    """
    key = "SOLVER.AUTO_SCALING_METHODS"
    ours = [name for name in scaling_methods if name.startswith(METHOD_PREFIX)]
    theirs = [name for name in scaling_methods if name not in ours]
    known = [METHOD_PREFIX + method for method in METHODS]
    if any(name not in known for name in ours) or any(n not in D2GO_METHODS for n in theirs):
        allowed = f"one of {', '.join(known)}, or d2go's {', '.join(D2GO_METHODS)}"
        raise ConfigError([Fault(key, tuple(scaling_methods), allowed, "correct the name")])
    if len(ours) > 1 or (ours and theirs):
        raise ConfigError(
            [
                Fault(
                    key,
                    tuple(scaling_methods),
                    "one d2scale method, alone",
                    "keep one: each scales the whole schedule, two would scale it twice",
                )
            ]
        )
    if theirs:
        return "per_gpu"
    return ours[0].removeprefix(METHOD_PREFIX) if ours else "keep_total"
