"""Training steps and memory of MetaFCOS beside those of other FCOS detectors.

    python benchmarks/training_speed.py [--device cuda] [--size 800x1333] [--images 2]
        [--precision float32 bfloat16] [--memory-size 640x640] [--only NAME ...]

The detectors take turns, a step each, so that whatever else the machine does falls on all alike.
Memory is counted, storage by storage, over one forward and backward, gradients included; on a GPU
it is what torch's allocator gave out. detectron2 and AdelaiDet take part where they are
installed.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from contestants import BUILDERS, Contestant, Sample, build, make_samples, step
from machine import keep, table_of

from d2scale.memory.tracker import StorageTracker

OURS = "MetaFCOS"
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_device(samples: list[Sample], device: torch.device) -> list[Sample]:
    """Return samples whose tensors are on ``device``: loading is not what is measured."""
    return [
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in sample.items()}
        for sample in samples
    ]


class Runner:
    """One contestant with its optimizer, ready to take timed steps."""

    def __init__(self, contestant: Contestant, samples: list[Sample], precision: Any) -> None:
        self.contestant = contestant
        self.batch = contestant.prepare(samples)
        self.precision = precision
        trained = [p for p in contestant.model.parameters() if p.requires_grad]
        # A rate of 0 does all the work and leaves the random weights as they are.
        self.optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9, fused=True)
        self.device = trained[0].device

    def __call__(self) -> tuple[float, float]:
        """Take one optimizer step; return its wall seconds and the process's CPU seconds."""
        self._synchronize()
        start, cpu = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        step(self.contestant, self.batch, self.precision)
        self.optimizer.step()
        self._synchronize()
        return time.perf_counter() - start, time.process_time() - cpu

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def speed_rows(options: argparse.Namespace, precision: str) -> Iterator[dict[str, Any]]:
    """Time all contestants in turn; yield a row each, with its speed over the best of others."""
    device = torch.device(options.device)
    height, width = options.size
    samples = to_device(make_samples(options.images, height, width), device)
    runners = {}
    for name in options.only:
        contestant = build(name, device, narrow=options.narrow)
        if contestant is None:
            print(f"{name} is not installed and left out")
            continue
        runners[name] = Runner(contestant, samples, PRECISIONS[precision])
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runners}
    for turn in range(options.warmup + options.repeats):
        for name in sorted(runners, key=lambda n: hash((n, turn))):
            taken = runners[name]()
            if turn >= options.warmup:
                times[name].append(taken)
    wall = {name: statistics.median(t for t, _ in taken) for name, taken in times.items()}
    others = [seconds for name, seconds in wall.items() if not name.startswith(OURS)]
    for name, taken in times.items():
        yield {
            **_setting("training step", name, options, (height, width), precision),
            "images / s": round(options.images / wall[name], 3),
            "CPU s a step": round(statistics.median(c for _, c in taken), 3),
            "steps": len(taken),
            "over the best other": round(min(others) / wall[name], 3) if others else None,
        }


def _setting(
    what: str, name: str, options: argparse.Namespace, size: tuple[int, int], precision: str
) -> dict[str, Any]:
    setting = {
        "what": what,
        "detector": name,
        "device": options.device,
        "images": f"{options.images} of {size[0]}x{size[1]}",
        "precision": precision,
        "torch": torch.__version__.partition("+")[0],
    }
    return {"key": ", ".join(setting.values()), **setting}


def memory_rows(options: argparse.Namespace, precision: str) -> Iterator[dict[str, Any]]:
    """Count each contestant's peak of forward and backward; yield a row each."""
    height, width = options.memory_size
    peaks: dict[str, int] = {}
    weights: dict[str, int] = {}
    for name in options.only:
        gc.collect()
        found = peak_bytes(name, make_samples(options.images, height, width), options, precision)
        if found is not None:
            peaks[name], weights[name] = found
    others = [peak for name, peak in peaks.items() if not name.startswith(OURS)]
    for name, peak in peaks.items():
        yield {
            **_setting("peak memory", name, options, (height, width), precision),
            "peak MB": round((peak + weights[name]) / 1e6, 1),
            "above the weights MB": round(peak / 1e6, 1),
            "over the best other": round(peak / min(others), 3) if others else None,
        }


def peak_bytes(
    name: str, samples: list[Sample], options: argparse.Namespace, precision: str
) -> tuple[int, int] | None:
    """Return the peak of a forward and backward above the weights, and the bytes of these.

    None where ``name`` is not installed.
    """
    device = torch.device(options.device)
    contestant = build(name, device, narrow=options.narrow)
    if contestant is None:
        return None
    batch = contestant.prepare(to_device(samples, device))
    held = [*contestant.model.parameters(), *contestant.model.buffers()]
    weights = sum(tensor.nbytes for tensor in held)
    if device.type == "cuda":
        for _ in range(2):  # the first step also loads libraries
            contestant.model.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            step(contestant, batch, PRECISIONS[precision])
        return int(torch.cuda.max_memory_allocated()) - weights, weights
    tracker = StorageTracker()
    with tracker:
        tracker.count(*held)
        step(contestant, batch, PRECISIONS[precision])
    return tracker.peak_bytes - weights, weights


def size(text: str) -> tuple[int, int]:
    """Read HEIGHTxWIDTH."""
    height, _, width = text.partition("x")
    return int(height), int(width)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=size, default=(320, 320))
    parser.add_argument("--memory-size", type=size, default=(640, 640))
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["float32"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    help_text = "few layers and channels, to try the script; keeps nothing"
    parser.add_argument("--narrow", action="store_true", help=help_text)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--discard", action="store_true", help="do not keep the rows")
    return parser.parse_args()


def main() -> None:
    """Measure, keep the rows, print them."""
    options = parse()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    made = []
    for precision in options.precision:
        if not options.no_speed:
            made += list(speed_rows(options, precision))
        if not options.no_memory:
            made += list(memory_rows(options, precision))
    rows = made if options.discard or options.narrow else keep("training_speed", made, "key")
    for what in ("training step", "peak memory"):
        if shown := [row for row in rows if row["what"] == what]:
            print(f"\n{what}\n" + table_of(shown, hidden=("key", "what", "machine")))


if __name__ == "__main__":
    main()
