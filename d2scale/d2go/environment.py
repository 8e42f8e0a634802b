"""Prepares a process for d2go: ``d2scale://`` addresses, and what newer versions of torch lack.

d2go reads ``--config-file``, and imports what torch 2.11 has removed, before it imports a runner.
detectron2 has a hook that comes earlier: ``DETECTRON2_ENV_MODULE=d2scale.d2go.environment``, which
``d2scale train --engine d2go`` sets.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import IO, Any

from iopath.common.file_io import PathHandler

from d2scale.config.loading import SHIPPED_PREFIX, resolve_config_path
from d2scale.errors import MissingPackageError

ENV_MODULE = "DETECTRON2_ENV_MODULE"
# The module that the user has named there, when d2scale puts its own in the same place.
USERS_ENV_MODULE = "D2SCALE_USERS_ENV_MODULE"

# Modules that d2go imports from torch, gone since 2.11, and where torchao has the same names.
_REMOVED = {
    "torch.ao.quantization.quantize_pt2e": (
        "torchao.quantization.pt2e.quantize_pt2e",
        ("convert_pt2e", "prepare_pt2e", "prepare_qat_pt2e"),
    ),
    "torch.ao.quantization.quantizer.xnnpack_quantizer": (
        "torchao.testing.pt2e._xnnpack_quantizer",
        ("XNNPACKQuantizer", "get_symmetric_quantization_config"),
    ),
}


class ShippedConfigHandler(PathHandler):
    """Maps ``d2scale://NAME.yaml`` to the file that comes with d2scale."""

    def _get_supported_prefixes(self) -> list[str]:
        return [SHIPPED_PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return resolve_config_path(path)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return True  # an unknown name raises, with the list of known ones

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return open(resolve_config_path(path), mode, buffering)


def setup_environment() -> None:
    """Register the prefix and let d2go be imported; detectron2 calls this when it is imported."""
    from detectron2.utils import env
    from detectron2.utils.file_io import PathManager

    PathManager.register_handler(ShippedConfigHandler(), allow_override=True)
    put_back_quantization()
    if users_module := os.environ.get(USERS_ENV_MODULE):
        env.setup_custom_environment(users_module)


def put_back_quantization() -> None:
    """Put modules that torch has removed in their place; their functions are torchao's."""
    import torch

    for name, (source, functions) in _REMOVED.items():
        if _is_missing(name):
            module = _PutBack(name)
            # For others may ask the import system about it.
            module.__spec__ = ModuleSpec(name, None)
            for function in functions:
                setattr(module, function, _call_of(source, function))
            sys.modules[name] = module
    if not hasattr(torch.export, "export_for_training"):
        torch.export.export_for_training = torch.export.export  # type: ignore[attr-defined]


def refuse_missing_quantization() -> None:
    """Raise a MissingPackageError if quantization by PT2E would look for torchao in vain."""
    put_back = any(isinstance(sys.modules.get(name), _PutBack) for name in _REMOVED)
    if put_back and _is_missing("torchao"):
        raise _missing_torchao()


class _PutBack(ModuleType):
    """A module in the place of one that torch has removed."""


def _missing_torchao() -> MissingPackageError:
    reason = "QUANTIZATION.PT2E with this version of torch"
    return MissingPackageError("torchao", reason, "pip install torchao")


def _is_missing(module: str) -> bool:
    try:
        return module not in sys.modules and importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # the package that held it has gone, too
        return True


def _call_of(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports ``name`` when it is called: importing torchao takes seconds.

    Raises:
        MissingPackageError: when called, if torchao is not installed.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            function = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            raise _missing_torchao() from error
        return function(*args, **kwargs)

    call.__name__ = name
    return call
