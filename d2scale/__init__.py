"""Run detection recipes written for a cluster on the GPUs at hand.

Importing this package needs neither torch nor any engine. ``d2scale.Runner``, the d2go
runner, is resolved when it is first asked for.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "Runner":
        try:
            from d2scale.d2go.start import load_runner

            return load_runner()
        except ModuleNotFoundError as error:
            from d2scale.errors import MissingPackageError

            if error.name not in ("d2go", "detectron2", "mobile_cv"):
                raise
            advice = "it is not on the package index: see 'With d2go' in README.md"
            raise MissingPackageError(error.name, "d2scale.Runner", advice) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
