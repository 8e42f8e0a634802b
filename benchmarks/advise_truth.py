"""Does d2scale advise name the batch that is really the fastest? One training for each batch.

    OMP_NUM_THREADS=1 python benchmarks/advise_truth.py [--output-dir output/advise]

Trains drawn shapes as large_batch.py does, by the gain rule, one forward a step, and takes the time
until the mean loss over the last images has fallen to what all of them reach. Then d2scale advise
has its say, from the recipe's own run for the noise and a few steps of each batch for the speed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
from itertools import accumulate
from pathlib import Path
from typing import Any

from large_batch import DATASETS, RECIPE, RECIPE_BATCH, SMALL, data_root
from machine import keep
from tabulate import tabulate

from d2scale.benchmark.first_steps import FirstStepsOptions, measure_first_steps
from d2scale.config import load_cfg
from d2scale.engine.run import train
from d2scale.planning.advice import Advice
from d2scale.run_folder.comparison import compare
from d2scale.run_folder.files import METRICS_FILE
from d2scale.run_folder.measurements import read_measurements
from meta_fcos.reproduction.data import datasets_under
from meta_fcos.reproduction.experiments import length_settings

BATCHES = (8, 16, 32)
# Seconds of training steps so far, and the mean loss over the last images.
Curve = list[tuple[float, float]]
# Images over which the loss is averaged.
_WINDOW_IMAGES = 320
_TOLERANCE = 1.01


def config(folder: Path, *opts: Any) -> Any:
    """Return the recipe, cut to the length of large_batch.py."""
    dataset = DATASETS["shapes"]
    cfg = load_cfg(RECIPE, [*SMALL, *dataset.options])
    settings = {
        **length_settings(cfg, dataset.images_seen),
        "OUTPUT_DIR": str(folder),
        "DATASETS.TEST": "()",
        "SOLVER.CHECKPOINT_PERIOD": 0,
        "WRITER_PERIOD": 1,
        "SOLVER.REFERENCE_WORLD_SIZE": 1,
    }
    cfg.merge_from_list([part for pair in settings.items() for part in pair] + list(opts))
    return cfg


def trained(folder: Path, batch: int) -> Curve:
    """Train with ``batch`` images a step; return seconds of steps and mean loss at each step."""
    cfg = config(folder / str(batch), "D2SCALE.IMS_PER_GPU", batch)
    cfg.D2SCALE.LR_RULE = "gain"
    with contextlib.redirect_stdout(io.StringIO()):
        train(cfg, method="max_memory")
    text = (folder / str(batch) / METRICS_FILE).read_text()
    steps = [line for line in map(json.loads, text.splitlines()) if "total_loss" in line]
    values = [line["total_loss"] for line in steps]
    window = max(1, _WINDOW_IMAGES // batch)
    means = [statistics.fmean(values[max(0, n - window) : n]) for n in range(1, len(values) + 1)]
    return list(zip(accumulate(line["time"] for line in steps), means, strict=True))


def advice_for(folder: Path) -> Advice:
    """Return the advice by the noise of the recipe's own run, and speeds measured now."""
    options = FirstStepsOptions(measures_noise=False, max_ims_per_gpu=max(BATCHES))
    here = measure_first_steps(config(folder / "advice"), options)
    return compare([read_measurements(folder / str(RECIPE_BATCH))], here).advice


def table(curves: dict[int, Curve], advice: Advice) -> list[dict[str, Any]]:
    """Return a row for each batch: what it took, and what was predicted."""
    target = _TOLERANCE * max(curve[-1][1] for curve in curves.values())
    times = {
        batch: next(seconds for seconds, loss in curve if loss <= target)
        for batch, curve in curves.items()
    }
    predicted = {row.candidate.ims_per_batch: row.seconds or math.inf for row in advice.rows}
    advised = min(BATCHES, key=lambda batch: predicted[batch])
    return [
        {
            "total batch": batch,
            "seconds to the loss": round(times[batch], 1),
            "over the fastest": f"{times[batch] / min(times.values()) - 1:.0%}",
            "seconds by advise": round(predicted[batch], 1),
            "advised": "yes" if batch == advised else "",
            "loss": round(target, 3),
        }
        for batch in BATCHES
    ]


def main() -> None:
    """Train, ask for advice, print both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("output/advise"), metavar="DIR")
    folder = parser.parse_args().output_dir.absolute()
    with datasets_under(data_root(DATASETS["shapes"], folder)):
        curves = {batch: trained(folder, batch) for batch in BATCHES}
        advice = advice_for(folder)
    kept = keep("advise_truth", table(curves, advice), "total batch")
    shown = [{k: v for k, v in row.items() if k != "machine"} for row in kept]
    print(tabulate(shown, headers="keys", tablefmt="pipe"))
    print(f"\nadvise: {advice.best.candidate.ims_per_batch} images a step; {advice.reason}")


if __name__ == "__main__":
    main()
