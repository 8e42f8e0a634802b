"""Find the file that ``MODEL.WEIGHTS`` names on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from d2scale.errors import CheckpointError, Fault

# A folder laid out as the paths behind detectron2://, such as ImageNetPretrained/MSRA/R-50.pkl.
WEIGHTS_VARIABLE = "D2SCALE_WEIGHTS"
# Where detectron2 and d2go keep what they have downloaded, and the variable that moves it.
CACHE_VARIABLE = "FVCORE_CACHE"
DEFAULT_CACHE = "~/.torch/iopath_cache"
ZOO_PREFIX = "detectron2://"
ZOO_ADDRESS = "https://dl.fbaipublicfiles.com/detectron2/"


def find_weights(name: str) -> Path:
    """Return the local file that ``MODEL.WEIGHTS`` means. Nothing is downloaded.

    ``name`` is a path, ``detectron2://...`` for the files of detectron2's model zoo, or an http(s)
    address. The latter two are looked for in the folder ``$D2SCALE_WEIGHTS`` and in the download
    cache that detectron2 uses (``$FVCORE_CACHE``, by default ``~/.torch/iopath_cache``). Raises
    CheckpointError, which says what to download and where to put it, if it is not there.
    """
    if "://" not in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        advice = "check the path, or set it to '' for none"
        raise CheckpointError([Fault("MODEL.WEIGHTS", name, "a file", advice)])
    address = name.replace(ZOO_PREFIX, ZOO_ADDRESS, 1) if name.startswith(ZOO_PREFIX) else name
    if not address.startswith(("https://", "http://")):
        allowed = f"a path, {ZOO_PREFIX}... or an https address"
        raise CheckpointError([Fault("MODEL.WEIGHTS", name, allowed, "download it, give its path")])
    paths = _paths_of(address)
    for path in paths:
        if path.is_file():
            return path
    advice = f"download {address} and put it at {' or '.join(map(str, paths))}"
    raise CheckpointError([Fault("MODEL.WEIGHTS", name, "a file on this machine", advice)])


def _paths_of(address: str) -> list[Path]:
    """Return where the file of an address may be on this machine, in order of preference."""
    in_cache = urlsplit(address).path.lstrip("/")
    paths = [Path(os.environ.get(CACHE_VARIABLE, DEFAULT_CACHE)).expanduser() / in_cache]
    if folder := os.environ.get(WEIGHTS_VARIABLE):
        is_of_zoo = address.startswith(ZOO_ADDRESS)
        relative = address.removeprefix(ZOO_ADDRESS) if is_of_zoo else in_cache
        paths.insert(0, Path(folder).expanduser() / relative)
    return paths
