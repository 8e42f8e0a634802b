"""Speed: steps and inference beside torchvision's FCOS, compilation, loading, a profile."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import training_speed
from contestants import build, make_samples
from loader_speed import d2scale_loader
from torch import nn

from campaign.setting import PUBLISHED, Row, Setting
from campaign.trace import summary
from d2scale import cli
from d2scale.benchmark.data import Batches, open_batches
from d2scale.benchmark.measure import (
    BenchmarkOptions,
    measure_inference,
    measure_training,
)
from d2scale.coco.dataset import load_training_dataset
from d2scale.engine.models import build_model
from d2scale.engine.step import build_step

_OURS, _OTHER_LAYOUT = "MetaFCOS, the recipe", "MetaFCOS, the other layout"
_THEIRS = "torchvision fcos_resnet50_fpn"


def command(setting: Setting, *, amp: bool) -> Iterator[Row]:
    """``d2scale benchmark`` with 2 and 16 images."""
    output = setting.folder / "benchmark.json"
    for images in setting.few((2, 16), (2,)):
        arguments = ["benchmark", PUBLISHED, "--ims-per-gpu", str(images), "--data", "random"]
        arguments += ["--images", str(setting.few(100, 1)), "--steps", str(setting.few(20, 1))]
        precision = setting.few("float16", "bfloat16")
        opts = ["SOLVER.AMP.ENABLED", str(amp), "SOLVER.AMP.PRECISION", precision]
        if status := cli.main([*arguments, "-o", str(output), *setting.opts(*opts)]):
            raise RuntimeError(f"d2scale benchmark ended with status {status}")
        yield {"key": f"{images} images", **json.loads(output.read_text())}


def against_torchvision(setting: Setting, *, precision: str) -> Iterator[Row]:
    """Training steps and their memory beside torchvision's FCOS, in both memory layouts."""
    height, width = setting.few((800, 1333), (64, 96))
    options = argparse.Namespace(
        device=setting.device.type,
        size=(height, width),
        memory_size=(height, width),
        images=setting.few(4, 1),
        repeats=setting.few(30, 1),
        warmup=setting.few(5, 0),
        only=[_OURS, _OTHER_LAYOUT, _THEIRS],
        narrow=setting.dry,
    )
    yield from training_speed.speed_rows(options, precision)
    yield from training_speed.memory_rows(options, precision)


def compiled(setting: Setting, *, precision: str) -> Iterator[Row]:
    """Training steps with the backbone and the head compiled by torch, beside those without."""
    # Of a dry run only the code around it is tried: compiling takes a minute on a CPU.
    compile_module = partial(torch.compile, backend=setting.few("inductor", "eager"))
    height, width = setting.few((800, 1333), (64, 96))
    samples = make_samples(setting.few(4, 1), height, width)
    samples = training_speed.to_device(samples, setting.device)
    for name in ("as written", "compiled"):
        contestant = build(_OURS, setting.device, narrow=setting.dry)
        assert contestant is not None
        if name == "compiled":
            model: Any = contestant.model
            model.backbone = compile_module(model.backbone)
            head = model.proposal_generator.fcos_head
            head.forward = compile_module(head.forward)
        runner = training_speed.Runner(
            contestant, samples, training_speed.PRECISIONS[setting.few(precision, "float32")]
        )
        first, _ = runner()
        times = sorted(runner()[0] for _ in range(setting.few(30, 1)))
        yield {
            "key": f"{name}, {precision}",
            "ms a step": round(1000 * times[len(times) // 2], 2),
            "s of the first": round(first, 2),
        }


class _Torchvision(nn.Module):
    """torchvision's detector, called as d2scale's models are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, samples: list[Row]) -> Any:
        device = next(self.parameters()).device
        return self.model([sample["image"].to(device) / 255.0 for sample in samples])


def inference(setting: Setting) -> Iterator[Row]:
    """Detection on single images, beside torchvision's FCOS."""
    options = BenchmarkOptions(images=setting.few(100, 1), warmup=setting.few(20, 0))
    height, width = setting.few((800, 1333), (32, 32))
    samples = make_samples(8, height, width)
    for name in (_OURS, _THEIRS):
        contestant = build(name, setting.device, narrow=setting.dry)
        assert contestant is not None
        model = contestant.model if name == _OURS else _Torchvision(contestant.model)
        batches = ([samples[number % 8]] for number in range(1 << 20))
        source = f"noise of {height}x{width}"
        yield {"key": name, **measure_inference(model, Batches(source, batches), options)}


def loader(setting: Setting) -> Iterator[Row]:
    """Images a second from the loader alone, and what a step waits for them."""
    data = setting.use_datasets()
    cores = len(os.sched_getaffinity(0))
    for workers in setting.few(sorted({0, 2, 4, 8, max(1, cores - 1)}), [0]):
        cfg = setting.cfg("DATALOADER.NUM_WORKERS", workers, "SOLVER.AMP.ENABLED", True)
        dataset = load_training_dataset(cfg)
        images = setting.few(400 if workers else 100, 4)
        start = time.perf_counter()
        made = sum(d2scale_loader(cfg, dataset, images))
        alone = made / (time.perf_counter() - start)
        options = BenchmarkOptions(steps=setting.few(15, 1), warmup_steps=1, counts_memory=False)
        count = setting.few(8, 2)
        with open_batches(cfg, "real", training=True, ims_per_batch=count) as batches:
            step = build_step(cfg, build_model(cfg).train(), ims_per_gpu=count)
            trained = measure_training(step, batches, options)
        yield {
            "key": f"{workers} workers",
            "data": data,
            "cores": cores,
            "loader alone, images / s": round(alone, 1),
            "training, images / s": round(trained["images a second"], 1),
            "waits of a step %": round(
                100 * trained["data seconds a step"] / trained["seconds a step"], 1
            ),
        }


def profile(setting: Setting, *, amp: bool) -> Iterator[Row]:
    """Ten steps by torch's profiler: idle time, waits of the host, overlap of the copies."""
    cfg = setting.cfg("SOLVER.AMP.ENABLED", amp)
    count = setting.few(8, 2)
    step = build_step(cfg, build_model(cfg).train(), ims_per_gpu=count)
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    with open_batches(cfg, "random", training=True, ims_per_batch=count) as batches:
        steps = setting.few(10, 1)
        for _ in range(3):
            step(next(batches.batches))
        setting.synchronize()
        with torch.profiler.profile() as profiled:
            for _ in range(steps):
                step(next(batches.batches))
            setting.synchronize()
    path = setting.folder / "trace.json"
    profiled.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    yield {"key": f"{steps} steps of {count} images", **summary(events, steps)}
    for event in sorted(profiled.key_averages(), key=_device_time, reverse=True)[:12]:
        yield {
            "key": f"operation {event.key}",
            "calls a step": round(event.count / steps, 1),
            "ms of the device a step": round(_device_time(event) / steps / 1000, 3),
        }


def _device_time(event: Any) -> float:
    return float(event.self_device_time_total)
