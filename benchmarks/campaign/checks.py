"""First things first: what machine this is, and the tests that need its GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import torch

from campaign.setting import REPOSITORY, Row, Setting
from d2scale.commands.doctor import diagnose
from d2scale.planning.gpu_assumptions import context_bytes
from d2scale.planning.memory_profile import GIB
from d2scale.step.precision import tf32_use


def doctor(setting: Setting) -> Iterator[Row]:
    """Versions, devices, TF32 and other switches, free memory, what a context takes."""
    yield {"key": "doctor", "report": diagnose().splitlines()}
    yield {
        "key": "switches",
        "TF32 in": tf32_use(_capability(setting)),
        "float32 matrix products": torch.get_float32_matmul_precision(),
        "cuDNN": torch.backends.cudnn.version(),
        "cuDNN benchmark": torch.backends.cudnn.benchmark,
        "cuDNN deterministic": torch.backends.cudnn.deterministic,
        "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""),
    }
    yield {"key": "device", **_device_facts(setting)}
    for name, work in (("a convolution", _convolution), ("a matrix product", _product)):
        work(setting.device)
        yield {
            "key": f"outside of the allocator after {name}",
            "GiB": round(outside_bytes(setting) / GIB, 3),
            "assumed by predictions GiB": round(assumed_context_bytes(setting) / GIB, 3),
        }


def _device_facts(setting: Setting) -> Row:
    facts: Row = {"name": setting.memory.name, "GiB": round(setting.memory.total_bytes / GIB, 2)}
    if setting.device.type == "cuda":
        facts["free GiB"] = round(torch.cuda.mem_get_info(setting.device)[0] / GIB, 2)
        facts["capability"] = ".".join(map(str, torch.cuda.get_device_capability(setting.device)))
        facts["bfloat16"] = torch.cuda.is_bf16_supported()
        facts["CUDA"] = torch.version.cuda
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


def assumed_context_bytes(setting: Setting) -> int:
    """Return what predictions take a context of this device for."""
    return context_bytes(_capability(setting))


def _capability(setting: Setting) -> int:
    on_cuda = setting.device.type == "cuda"
    return torch.cuda.get_device_capability(setting.device)[0] if on_cuda else 0


def outside_bytes(setting: Setting) -> int:
    """Return the device's memory that is taken, by whomever, but not by this process's tensors."""
    if setting.device.type != "cuda":
        return 0
    torch.cuda.synchronize(setting.device)
    free, total = torch.cuda.mem_get_info(setting.device)
    return int(total - free - torch.cuda.memory_reserved(setting.device))


def _convolution(device: torch.device) -> None:
    weights = torch.randn(8, 8, 3, 3, device=device, requires_grad=True)
    torch.nn.functional.conv2d(torch.randn(1, 8, 64, 64, device=device), weights).sum().backward()


def _product(device: torch.device) -> None:
    matrix = torch.randn(64, 64, device=device)
    torch.mm(matrix, matrix)


def run_tests(
    setting: Setting, *, paths: tuple[str, ...], marked: bool = True, hidden: bool = False
) -> Iterator[Row]:
    """Tests of this repository on the GPU, and the errors that they measure.

    Those ``marked`` gpu, or all of the files; with ``hidden`` as if there were no GPU.
    """
    found = setting.folder / "junit.xml"
    found.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
    # Warnings that only a GPU gives shall not fail what works.
    command += [f"--junitxml={found}", "-o", "filterwarnings=default"]
    command += ["-m", "gpu"] if marked else []
    command += ["--collect-only"] if setting.dry else []
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""} if hidden else None
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, check=False)  # noqa: S603
    if setting.dry:
        if done.returncode:
            raise RuntimeError(f"pytest ended with status {done.returncode}")
        yield {"key": "collected", "paths": list(paths)}
        return
    yield from junit_rows(found.read_text(), failures_only=not marked)
    if done.returncode:
        raise RuntimeError(f"pytest ended with status {done.returncode}: some tests failed")


def junit_rows(xml: str, *, failures_only: bool) -> Iterator[Row]:
    """Yield a row a test with what it recorded, or only those that failed; then their number."""
    outcomes = {"failed": 0, "skipped": 0, "passed": 0}
    # pytest wrote it.
    for case in ElementTree.fromstring(xml).iter("testcase"):  # noqa: S314
        kinds = {child.tag for child in case}
        failed = kinds & {"failure", "error"}
        outcome = "failed" if failed else "skipped" if "skipped" in kinds else "passed"
        outcomes[outcome] += 1
        if failures_only and not failed:
            continue
        row = {"key": f"{case.get('classname')}.{case.get('name')}", "outcome": outcome}
        row["seconds"] = round(float(case.get("time", 0)), 2)
        row |= {p.get("name", ""): p.get("value") for p in case.iter("property")}
        ends = [child for child in case if child.tag in ("failure", "error", "skipped")]
        if ends:
            row["reason"] = (ends[0].get("message") or "")[:500]
        yield row
    yield {"key": "all", **outcomes}
