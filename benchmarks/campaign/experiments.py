"""The published experiments, cut to a few hundred steps, and the report on them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

from campaign.setting import Row, Setting
from d2scale.engine.run import train
from d2scale.report import write_report
from d2scale.run_folder.files import METRICS_FILE, PLAN_FILE
from meta_fcos.reproduction.experiments import EXPERIMENTS, length_settings
from meta_fcos.reproduction.final_loss import final_loss

_IMAGES = 4800  # 300 steps of the published batch
WORDS = tuple(one.word for one in EXPERIMENTS)


def experiment(setting: Setting, *, word: str) -> Iterator[Row]:
    """A published experiment, or its batch by the gain rule, cut to 4800 images, with AMP."""
    (chosen,) = (one for one in EXPERIMENTS if one.word == word)
    data = setting.use_datasets()
    folder = setting.folder / "experiments" / chosen.folder
    shutil.rmtree(folder, ignore_errors=True)
    cfg = setting.cfg(
        "SOLVER.AMP.ENABLED", True, recipe=chosen.recipe("full", "exact"), trains=True
    )
    settings = length_settings(cfg, setting.few(_IMAGES, 96))
    if "d2scale_max_memory" in cfg.SOLVER.AUTO_SCALING_METHODS:
        # As many micro-batches as the GPUs that it was published on.
        settings["D2SCALE.ACCUMULATION_STEPS"] = chosen.gpus
    settings |= {"OUTPUT_DIR": str(folder), "WRITER_PERIOD": 1, "SEED": 1}
    cfg.merge_from_list([part for pair in settings.items() for part in pair])
    results = train(cfg)
    plan = json.loads((folder / PLAN_FILE).read_text())
    lines = [*map(json.loads, (folder / METRICS_FILE).read_text().splitlines())]
    steps = [line for line in lines if "total_loss" in line]
    loss = final_loss([line["iteration"] + 1 for line in steps], [s["total_loss"] for s in steps])
    yield {
        "key": chosen.title,
        "data": data,
        "images a step": plan["ims_per_batch"],
        "images per GPU": plan["ims_per_gpu"],
        "learning-rate rule": plan["lr_rule"],
        "steps": len(steps),
        "images": steps[-1]["images_seen"],
        "seconds": round(steps[-1]["elapsed_seconds"], 1),
        "final loss": None if loss is None else round(loss.mean, 4),
        "AP": results.get("bbox/AP"),
        "gain of the last step": steps[-1].get("gain"),
        "noise scale": steps[-1].get("noise_scale"),
    }


def report(setting: Setting) -> Iterator[Row]:
    """The report on the experiments that have been run."""
    setting.use_datasets()
    if setting.dry:  # nothing is left of other slices
        yield from experiment(setting, word="gain")
    folders = [setting.folder / "experiments" / one.folder for one in EXPERIMENTS]
    found = [folder for folder in folders if (folder / METRICS_FILE).exists()]
    if not found:
        yield {"key": "report", "left out": "no experiment has been run here"}
        return
    files = write_report(found, setting.folder / "report.html", published=True)
    yield {
        "key": "report",
        "runs": [folder.name for folder in found],
        "table": files.markdown.read_text()[:8000],
        "pictures": len(files.pictures),
    }
