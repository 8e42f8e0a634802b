"""Memory: predicted against reserved, chosen against largest, and what else takes some."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import memory_gpu
import torch

from campaign.checks import assumed_context_bytes, outside_bytes
from campaign.setting import PUBLISHED, Row, Setting
from d2scale import cli
from d2scale.engine.memory import measure_on_ranks
from d2scale.planning.memory_profile import GIB
from d2scale.run_folder.contents import last_checkpoint
from d2scale.run_folder.files import FINAL_CHECKPOINT, METRICS_FILE, PLAN_FILE

_BUDGET_GIB = 16.0
_LEFT_GIB = 8.0
_POLL_SECONDS = 0.02


def predicted(setting: Setting, *, depth: int, names: tuple[str, ...]) -> Iterator[Row]:
    """Predicted against reserved memory, 1 to 32 images, and the corrections that it asks for."""
    channels = 256 if depth == 50 else 64
    layers = ("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", channels)
    opts = setting.opts(*setting.few(layers, ()))
    most = setting.few(32, 2)
    chosen = setting.few(names, names[:1])
    rows = []
    for row in memory_gpu.accuracy(setting.memory, opts, chosen, most):
        rows.append(row)
        yield row
    for name, of_variant in groupby(rows, key=lambda row: row["choice"]):
        yield {"key": f"correction, {name}", **correction([*of_variant])}
    yield {
        "key": "context",
        "GiB": round(outside_bytes(setting) / GIB, 3),
        "assumed GiB": round(assumed_context_bytes(setting) / GIB, 3),
    }


def correction(rows: list[Row]) -> Row:
    """Return what is reserved beyond the prediction: a constant, and bytes an image."""
    images = [row["images"] for row in rows]
    beyond = [-row["reserved GiB"] * row["reserved error %"] / 100 for row in rows]
    if len(set(images)) < 2:
        return {"constant MiB": round(1024 * beyond[0]), "MiB an image": 0.0}
    slope, constant = statistics.linear_regression(images, beyond)
    return {"constant MiB": round(1024 * constant), "MiB an image": round(1024 * slope, 1)}


def choice(setting: Setting, *, budget_gib: float) -> Iterator[Row]:
    """Chosen against largest number of images that trains, with the trials that it took."""
    names = setting.few(("float32", "AMP", "AMP, checkpointing"), ("float32",))
    rows = memory_gpu.choice(setting.memory, setting.opts(), names, (budget_gib,))
    yield from _or_too_small(rows, setting, budget_gib)


def epoch(setting: Setting, *, budget_gib: float) -> Iterator[Row]:
    """Sixty multi-scale steps at the chosen number of images: out-of-memory errors, retries."""
    data = setting.use_datasets()
    steps = setting.few(60, 2)
    rows = memory_gpu.epoch(setting.memory, setting.opts(), (budget_gib,), steps)
    for row in _or_too_small(rows, setting, budget_gib):
        yield {**row, "data": data}


def _or_too_small(rows: Iterator[Row], setting: Setting, budget_gib: float) -> Iterator[Row]:
    made = False
    for row in rows:
        made = True
        yield row
    if not made:
        size = f"{setting.memory.total_bytes / GIB:.1f}"
        reason = f"the device has {size} GiB, or one image does not fit"
        yield {"key": f"{budget_gib:g} GiB", "left out": reason}


def budget(setting: Setting) -> Iterator[Row]:
    """Training that fills 16 GiB, with AMP, killed after a checkpoint, --resume, an evaluation."""
    data = setting.use_datasets()
    folder = setting.folder / "budget"
    shutil.rmtree(folder, ignore_errors=True)
    gib = setting.few(_BUDGET_GIB, 0.8)  # a prediction's context is that of a GPU
    # Not on a CPU: of a map of one pixel oneDNN's bfloat16 gradients may hold what was in memory.
    amp = setting.few(True, False)
    opts = setting.opts("SOLVER.AMP.ENABLED", amp, "D2SCALE.MEMORY.BUDGET_GIB", gib, trains=True)
    # Iterations of the recipe, which the plan divides by the batch ratio.
    opts += ["SOLVER.REFERENCE_WORLD_SIZE", "1", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()"]
    opts += ["SOLVER.MAX_ITER", str(setting.few(400, 16)), "SOLVER.WARMUP_ITERS", "0"]
    opts += ["SOLVER.CHECKPOINT_PERIOD", str(setting.few(200, 2)), "WRITER_PERIOD", "1"]
    # From random weights, at ten times the batch and the rate.
    opts += ["OUTPUT_DIR", str(folder), "D2SCALE.LR_RULE", "linear", "SOLVER.BASE_LR", "0.0002"]
    opts += ["D2SCALE.MAX_IMS_PER_BATCH", str(setting.few(0, 4))]
    command = ["train", "--config-file", PUBLISHED, "--method", "max_memory"]
    _train_and_kill([*command, *opts], folder)
    yield {"key": "killed", "data": data, **_trained(folder)}
    if status := cli.main([*command, "--resume", *opts]):
        raise RuntimeError(f"d2scale train --resume ended with status {status}")
    yield {"key": "resumed", "data": data, **_trained(folder)}


def _train_and_kill(arguments: list[str], folder: Path) -> None:
    """Run ``d2scale``, and kill it once it has saved a checkpoint and logged a step."""
    command = [sys.executable, "-m", "d2scale.cli", *arguments]
    with subprocess.Popen(command) as process:  # noqa: S603
        try:
            while process.poll() is None and not (last_checkpoint(folder) and _has_logged(folder)):
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
    if process.returncode != -signal.SIGKILL or (folder / FINAL_CHECKPOINT).exists():
        raise RuntimeError(f"d2scale train was not killed: it ended with {process.returncode}")


def _has_logged(folder: Path) -> bool:
    metrics = folder / METRICS_FILE
    return metrics.exists() and metrics.stat().st_size > 0


def _trained(folder: Path) -> Row:
    """Return what a run's folder says, and the memory that this process has reserved."""
    metrics = [*map(json.loads, (folder / METRICS_FILE).read_text().splitlines())]
    plan = json.loads((folder / PLAN_FILE).read_text())
    losses = [line["total_loss"] for line in metrics if "total_loss" in line]
    on_cuda = torch.cuda.is_available()
    return {
        "images per GPU": plan["ims_per_gpu"],
        "steps": len(losses),
        "first loss": round(losses[0], 4),
        "last loss": round(losses[-1], 4),
        "AP": next((line["bbox/AP"] for line in metrics[::-1] if "bbox/AP" in line), None),
        "reserved GiB": round(torch.cuda.max_memory_reserved() / GIB, 3) if on_cuda else None,
    }


def neighbour(setting: Setting) -> Iterator[Row]:
    """Another process on the card: what the measurement leaves it, and steps at the choice."""
    setting.use_datasets()
    cfg = setting.cfg()
    cfg.D2SCALE.MEMORY.BUDGET_GIB = setting.few(0.0, setting.memory.total_bytes / GIB)
    cfg.D2SCALE.MAX_IMS_PER_BATCH = setting.few(0, 1)
    yield {"key": "alone", **_measured(setting, cfg)}
    # It leaves less than the images of a small dataset fill.
    held = setting.few(_free_gib(setting) - _LEFT_GIB, 0.001)
    if held < 0:
        yield {"key": "beside another", "left out": f"less than {_LEFT_GIB:g} GiB are free"}
        return
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", _HOLD, setting.device.type, str(held)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()  # it holds its memory now
        yield {"key": "beside another", "it holds GiB": round(held, 2), **_measured(setting, cfg)}


def _free_gib(setting: Setting) -> float:
    if setting.device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(setting.device)[0] / GIB)


_HOLD = """
import sys, torch
device, gib = sys.argv[1:]
held = torch.ones(int(float(gib) * 2**30), dtype=torch.uint8, device=device)
print(held.sum().item(), flush=True)
sys.stdin.read()
"""


def _measured(setting: Setting, cfg: object) -> Row:
    profile = measure_on_ranks(cfg)
    trained = max((point.ims_per_gpu for point in profile.points), default=0)
    return {
        "images per GPU that fit": trained,
        "context GiB": round(profile.context_bytes / GIB, 3),
        "outside of the allocator GiB": round(outside_bytes(setting) / GIB, 3),
    }
