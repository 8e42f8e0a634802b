"""Run folders as the default engine leaves them, with times and noise chosen by a test."""

from __future__ import annotations

import json

from d2scale.config import load_recipe
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan

RECIPE = "SOLVER: {IMS_PER_BATCH: 8, REFERENCE_WORLD_SIZE: 1, MAX_ITER: 100, STEPS: [80]}\n"
MACHINE = {"device": "cpu", "cpu": "a processor", "cpu_cores": 2}


def metric_lines(ims_per_batch, seconds, noise_scale=8.0, steps=100, **others):
    """Lines of a training without the gain rule, one every ten steps."""
    noise = {} if noise_scale == "none" else {"noise_scale": noise_scale}
    return [
        {
            "iteration": step - 1,
            "images_seen": step * ims_per_batch,
            "elapsed_seconds": step * seconds,
            "time": seconds,
            "total_loss": 1.0,
            **noise,
            **others,
        }
        for step in range(10, steps + 1, 10)
    ]


def write_run(folder, ims_per_batch=8, seconds=0.5, *, opts=(), gpus=1, rule="gain", **metrics):
    """Write the folder of a run with this many images in one forward of one GPU."""
    folder.mkdir(parents=True)
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(RECIPE)
    cfg, _ = load_recipe(str(recipe), opts)
    hardware = Hardware(gpus, ims_per_gpu=ims_per_batch)
    plan = make_plan(cfg, hardware, method="max_memory", lr_rule=rule)
    (folder / "config.yaml").write_text(plan.apply(cfg).dump())
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    (folder / "machine.json").write_text(json.dumps(MACHINE))
    write_metrics(folder, metric_lines(plan.ims_per_batch, seconds, **metrics))
    return folder


def write_metrics(folder, lines):
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
