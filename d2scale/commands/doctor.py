"""``d2scale doctor``: show versions, devices and engines, for a person and for a bug report."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import socket
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from ipaddress import IPv4Address

import d2scale
from d2scale.commands.common import Commands, add_command
from d2scale.launch.network import interface_towards
from d2scale.planning.memory_profile import GIB

_PACKAGES = ("torch", "torchvision", "numpy", "fvcore", "tensorboard", "matplotlib")
_UPSTREAM = ("detectron2", "d2go", "mobile_cv")
_TRAIN = "pip install 'd2scale[train]'"
_LITTLE_SHM_GIB, _LITTLE_DISK_GIB = 1, 5
_FEW_FILES, _MANY_FILES = 1024, 65536
_FEW_PROCESSES = 1024
_LITTLE_TMP_GIB = 0.05
_OTHER = "only the engines of upstream recipes need it; see the README"


def add_parser(commands: Commands) -> None:
    """Add ``d2scale doctor``."""
    add_command(commands, "doctor", "show versions, devices, and what can run here", run)


def run(_: argparse.Namespace) -> int:
    """Run ``d2scale doctor``."""
    print(diagnose())
    return 0


def diagnose() -> str:
    """Return a report of versions, devices and engines, a line each."""
    lines = [
        ("d2scale", d2scale.__version__),
        ("Python", f"{platform.python_version()} ({sys.executable})"),
        ("platform", f"{platform.platform()}, {os.cpu_count()} CPU cores"),
        *((name, _version(name, name, _TRAIN)) for name in _PACKAGES),
        *((name, _version(name.replace("_", "-"), name, _OTHER)) for name in _UPSTREAM),
        ("devices", _devices()),
        ("host", _host()),
        ("shared memory", _shared_memory()),
        ("open files", _open_files()),
        ("processes", _processes()),
        ("free disk", _free_disk()),
        ("temporary", _temporary()),
        ("datasets", os.path.abspath(os.environ.get("DETECTRON2_DATASETS", "datasets"))),
    ]
    return "\n".join(f"{name + ':':15}{value}" for name, value in lines)


def _version(package: str, module: str, advice: str) -> str:
    if importlib.util.find_spec(module) is None:
        return f"not installed ({advice})"
    try:
        return version(package)
    except PackageNotFoundError:
        return "importable, version unknown"


def _host() -> str:
    """Tell at which address other machines would look for this one, by its name."""
    name = socket.gethostname()
    advice = "other machines do not find it by its name: give torchrun --local-addr ADDRESS"
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return f"{name}, without an address; {advice}"
    if IPv4Address(address).is_loopback:
        return f"{name} at {address}, a loopback address; {advice}"
    return f"{name} at {address} ({interface_towards([address]) or 'no known interface'})"


def _shared_memory() -> str:
    """Tell whether loader workers can hand images over, and NCCL its buffers."""
    try:
        free_gib = shutil.disk_usage("/dev/shm").free / GIB  # noqa: S108  # only looked at
    except OSError:
        return "unknown"
    advice = (
        "images go through pipes when it is full, workers need 12 KiB each for locks, and NCCL may "
        "fail; in Docker: --shm-size 8g"
    )
    return f"{free_gib:.2f} GiB free" + (f"; {advice}" if free_gib < _LITTLE_SHM_GIB else "")


def _open_files() -> str:
    """Tell whether loader workers can open what they need: sockets, images, shared memory."""
    try:
        import resource
    except ImportError:
        return "unknown"
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    advice = f"raise it with ulimit -n {_MANY_FILES if most < 0 else min(most, _MANY_FILES)}"
    return f"at most {limit}" + (f"; {advice}" if 0 <= limit < _FEW_FILES else "")


def _processes() -> str:
    """Tell whether ranks, their loader workers and all their threads can be started."""
    try:
        import resource
    except ImportError:
        return "unknown"
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if limit < 0:
        return "not limited"
    advice = "raise it with ulimit -u, in a container its limit of pids"
    return f"at most {limit}" + (f"; {advice}" if limit < _FEW_PROCESSES else "")


def _temporary() -> str:
    """Tell where ranks exchange addresses and errors, and whether they can."""
    try:
        folder = tempfile.gettempdir()
    except OSError:
        return "none can be written; make room, or set TMPDIR: several ranks cannot start"
    free_gib = shutil.disk_usage(folder).free / GIB
    advice = "ranks and loader workers need some of it; make room, or set TMPDIR"
    return f"{folder}, {free_gib:.2f} GiB free" + (
        f"; {advice}" if free_gib < _LITTLE_TMP_GIB else ""
    )


def _free_disk() -> str:
    """Tell what is left for checkpoints in the working directory."""
    if not os.access(os.getcwd(), os.W_OK):
        return "none here, for this folder cannot be written; set OUTPUT_DIR to another"
    free_gib = shutil.disk_usage(os.getcwd()).free / GIB
    advice = "a checkpoint of a large model has 0.4 GiB, and a run keeps all of them"
    return f"{free_gib:.1f} GiB here" + (f"; {advice}" if free_gib < _LITTLE_DISK_GIB else "")


def _devices() -> str:
    if importlib.util.find_spec("torch") is None:
        return "unknown without torch"
    import torch

    from d2scale.step.precision import tf32_use

    if not torch.cuda.is_available():
        return "no CUDA device; training runs on the CPU"
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return "; ".join(
        f"{one.name}, {one.total_memory / 2**30:.1f} GiB, TF32 for {tf32_use(one.major)}"
        for one in devices
    )
