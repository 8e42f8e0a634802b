"""``d2scale demo``: from the 64-GPU recipe to three trained detectors on the machine at hand."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from d2scale.config import load_cfg, load_recipe
from d2scale.engine.data.catalog import ROOT_VARIABLE, datasets_root
from d2scale.engine.run import train
from d2scale.engine.writers import METRICS_FILE
from d2scale.errors import ConfigError, Fault
from d2scale.plan import Hardware, make_plan
from d2scale.plan_formats import to_table
from d2scale.synthetic import write_shapes_dataset

RECIPE = "d2scale://MetaFCOS/Meta-FCOS-pretrain.yaml"
SMALL_FORM = "d2scale://MetaFCOS/small-cpu.yaml"
TRAIN_IMAGES = 512
VAL_IMAGES = 64
# A folder with this file was made by the demo, which may make it anew.
_MARKER = "made-by-d2scale-demo"


@dataclass(frozen=True)
class Experiment:
    """One of the three published experiments, in small.

    Attributes:
        name: as the tables call it, and its folder.
        processes: ranks.
        method: scaling method.
        options: config keys that differ from the small form.
    """

    name: str
    processes: int
    method: str
    options: tuple[str, ...] = ()


EXPERIMENTS = (
    Experiment("1 baseline", 2, "keep_total"),
    Experiment("2 same batch", 1, "keep_total"),
    Experiment("3 large batch", 2, "max_memory", ("D2SCALE.IMS_PER_GPU", "8")),
)


def run_demo(output_dir: str) -> Iterator[str]:
    """Plan, train and compare, yielding what a reader should see as it becomes known.

    Args:
        output_dir: gets the data, if none is at hand, and a run folder for each experiment. What
            an earlier demo left there is made anew.

    Raises:
        ConfigError: if the folder holds something else, or cannot be written.
    """
    folder = Path(output_dir)
    _claim(folder)
    yield _data_at_hand(folder)
    yield _plan_of_the_recipe()
    columns = {}
    for experiment in EXPERIMENTS:
        yield f"\nExperiment {experiment.name}, {experiment.processes} process(es)"
        columns[experiment.name] = _run(experiment, folder)
    yield _comparison(columns)
    yield f"\nRun folders, with logs, metrics and checkpoints: {folder.absolute()}"


def _claim(folder: Path) -> None:
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / _MARKER).exists():
            raise _folder_fault(folder, "it holds other files")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER).touch()
        for experiment in EXPERIMENTS:
            shutil.rmtree(folder / _folder_name(experiment), ignore_errors=True)
    except OSError as error:
        raise _folder_fault(folder, f"{error.strerror}") from error


def _folder_fault(folder: Path, reason: str) -> ConfigError:
    return ConfigError(
        [Fault("--output-dir", str(folder), "a new or empty folder", f"choose one ({reason})")]
    )


def _folder_name(experiment: Experiment) -> str:
    return "experiment-" + experiment.name.replace(" ", "-")


def _data_at_hand(folder: Path) -> str:
    """Point the dataset names at COCO, cut to a few images, or at drawn shapes."""
    real = datasets_root().absolute() / "coco"
    if (real / "annotations" / "instances_train2017.json").exists():
        target = folder / "coco-subset"
        _link_subset(real, target / "coco")
        text = (
            f"COCO found in {real}; the demo uses its first {TRAIN_IMAGES} training and "
            f"{VAL_IMAGES} validation images.\nMinutes do not teach photographs: compare the "
            "losses, not the AP."
        )
    else:
        target = folder / "shapes"
        write_shapes_dataset(target, TRAIN_IMAGES, VAL_IMAGES)
        text = (
            f"No COCO in {real}; the demo draws shapes under {target} in COCO's format.\n"
            f"Set {ROOT_VARIABLE} to the folder that holds coco/ to use the real one."
        )
    os.environ[ROOT_VARIABLE] = str(target.absolute())
    return text


def _link_subset(real: Path, target: Path) -> None:
    """Lay out COCO anew with fewer images: small annotation files, links to the image folders."""
    (target / "annotations").mkdir(parents=True, exist_ok=True)
    for part, count in (("train2017", TRAIN_IMAGES), ("val2017", VAL_IMAGES)):
        content = json.loads((real / "annotations" / f"instances_{part}.json").read_bytes())
        content["images"] = sorted(content["images"], key=lambda image: image["id"])[:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [
            entry for entry in content["annotations"] if entry["image_id"] in kept
        ]
        (target / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))
        link = target / part
        link.unlink(missing_ok=True)
        link.symlink_to(real / part)


def _plan_of_the_recipe() -> str:
    """Show what the 64-GPU recipe becomes here, by d2go's rule and by d2scale's."""
    import torch

    gpus = max(1, torch.cuda.device_count())
    cfg, _ = load_recipe(RECIPE)
    plans = [
        (
            "The 64-GPU recipe as d2go scales it: the images per GPU stay, the steps explode.",
            make_plan(cfg, Hardware(gpus), method="per_gpu"),
        ),
        (
            "The same recipe with its total batch kept, eight images at a time.",
            make_plan(cfg, Hardware(gpus, ims_per_gpu=8), method="keep_total"),
        ),
    ]
    return "\n".join(f"\n{title}\n\n{to_table(plan)}" for title, plan in plans)


def _run(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """Train one experiment and return its column of the comparison."""
    output = folder / _folder_name(experiment)
    options = ("OUTPUT_DIR", str(output), *experiment.options)
    started = time.monotonic()
    results = train(
        load_cfg(SMALL_FORM, options), num_processes=experiment.processes, method=experiment.method
    )
    seconds = time.monotonic() - started
    plan = json.loads((output / "plan.json").read_text())
    trained = load_cfg(str(output / "config.yaml"))
    last = [
        entry
        for line in (output / METRICS_FILE).read_text().splitlines()
        if "total_loss" in (entry := json.loads(line))
    ][-1]
    return {
        "processes": experiment.processes,
        "method": experiment.method,
        "images per GPU": plan["ims_per_gpu"],
        "total batch": plan["ims_per_batch"],
        "BASE_LR": f"{trained.SOLVER.BASE_LR:g}",
        "MAX_ITER": trained.SOLVER.MAX_ITER,
        "STEPS": ", ".join(map(str, trained.SOLVER.STEPS)),
        "images seen": last["images_seen"],
        "final total_loss": f"{last['total_loss']:.4f}",
        "seconds": f"{seconds:.0f}",
        **_overall_metrics(results),
    }


def _overall_metrics(results: Mapping[str, float]) -> dict[str, str]:
    """Return the published columns, without the AP of each class."""
    names = [key for key in results if key.startswith("bbox/") and not key.startswith("bbox/AP-")]
    return {key.removeprefix("bbox/"): f"{results[key]:.3f}" for key in names}


def _comparison(columns: dict[str, dict[str, Any]]) -> str:
    names = next(iter(columns.values())).keys()
    rows = [(name, *(column[name] for column in columns.values())) for name in names]
    table = tabulate(rows, headers=["", *columns], tablefmt="pipe", disable_numparse=True)
    return (
        f"\nThe three experiments side by side\n\n{table}\n\n"
        "1 and 2 take the same steps, up to rounding, which training amplifies. 3 fills more "
        "memory\nand takes half as many steps, twice the size, over the same images."
    )
