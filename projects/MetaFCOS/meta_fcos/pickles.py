"""Reading pickled weights through an allow-list: a pickle can call any function otherwise."""

from __future__ import annotations

import builtins
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from d2scale.errors import CheckpointError, Fault, one_line

_PLAIN = (
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set",
    "str", "tuple",
)  # fmt: skip
# numpy's own rebuilding functions, without importing its private modules.
_array = np.empty(1)
_REBUILD_ARRAY = _array.__reduce__()[0]
_FROM_BUFFER = _array.__reduce_ex__(5)[0]
_SCALAR = np.float64(0).__reduce__()[0]


def _encode(text: str, encoding: str) -> bytes:
    """What a pickle of protocol 2 calls to make bytes; only for the encoding that it uses."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _REBUILD_ARRAY
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _SCALAR
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _FROM_BUFFER
for _module in ("builtins", "__builtin__"):
    _ALLOWED.update({(_module, name): getattr(builtins, name) for name in _PLAIN})


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def load_pickle(path: Path) -> Any:
    """Return what a ``.pkl`` file holds: numpy arrays in plain containers.

    Raises:
        CheckpointError: if it asks for any other class or function, which is not called; or if
            it is not a whole pickle.
    """
    try:
        with open(path, "rb") as file:
            # The zoo's files were written by Python 2, whose byte strings numpy reads as latin1.
            return _Unpickler(file, encoding="latin1").load()
    except Exception as error:  # a broken pickle raises nearly any type
        allowed = "a whole pickle of numpy arrays, OrderedDict and builtin containers"
        raise unreadable(path, one_line(error), allowed) from error


def unreadable(path: Path, reason: str, allowed: str) -> CheckpointError:
    """Return the error of a file of weights that cannot be read."""
    value = f"unreadable ({reason})"
    advice = "it is truncated or holds other objects; use another one"
    return CheckpointError([Fault(str(path), value, allowed, advice)])
