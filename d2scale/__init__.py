"""Run detection recipes written for a cluster on the GPUs at hand.

Importing this package needs neither torch nor any engine. ``d2scale.Runner``, the d2go
runner, is resolved when it is first asked for.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Runner":
        from d2scale.d2go.runner import Runner

        return Runner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
