"""The published comparison on this machine: trainings and a report."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator
from pathlib import Path

from d2scale.errors import D2ScaleError, MissingPackageError
from d2scale.report import write_report
from d2scale.run_folder.lock import run_lock
from meta_fcos.reproduction.data import datasets_under, make
from meta_fcos.reproduction.folder import claim
from meta_fcos.reproduction.planned_experiment import PlannedExperiment, is_finished
from meta_fcos.reproduction.prepare import Reproduction, ReproductionOptions, prepare
from meta_fcos.reproduction.process import run_command
from meta_fcos.reproduction.summary import (
    count,
    loss_verdicts,
    plan_table,
    result_table,
    rule_verdict,
)

REPORT = "report.html"


def reproduce(options: ReproductionOptions, *, only_plan: bool = False) -> Iterator[str]:
    """Check, plan, train and report, yielding each piece of text to print when it is known.

    Experiments that are finished in the folder are not run again; one that was stopped goes on
    from its last checkpoint. ``only_plan`` ends with the plan, with nothing written.

    ConfigError with every fault of options, folder, data and weights, before anything is written;
    D2ScaleError for what goes wrong later. Ctrl-C ends all processes first.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("matplotlib", "the report", "pip install 'd2scale[train]'")
    reproduction = prepare(options)
    yield describe(reproduction)
    if only_plan:
        return
    claim(reproduction.folder, reproduction.settings)
    with run_lock(reproduction.folder, key="--output-dir"):
        make(reproduction.data, reproduction.subset)
        for planned in reproduction.experiments:
            if planned.experiment not in reproduction.finished:
                command = shlex.join(["d2scale", *planned.arguments])
                yield f"\nExperiment {planned.experiment.title}\n$ {command}"
                _train(planned, reproduction.data.root)
        yield from _results(reproduction)


def describe(reproduction: Reproduction) -> str:
    """Return the plan of a reproduction as text."""
    form = "as published" if reproduction.form == "full" else "in the small form for a CPU"
    counted = reproduction.training_images
    images = f", {counted} training images with boxes" if counted else ""
    lines = [
        f"The published experiments {form}; this machine: {reproduction.machine.name}",
        f"Folder: {reproduction.folder.absolute()}",
        f"Data: {reproduction.data.text}{images}",
        *_notes(reproduction),
    ]
    return "\n".join(lines) + "\n\n" + plan_table(reproduction.experiments)


def _notes(reproduction: Reproduction) -> Iterator[str]:
    machine = reproduction.machine
    split = [one.experiment.title for one in reproduction.experiments if one.on_fewer_gpus]
    if split:
        yield (
            f"{' and '.join(split)}: written for two GPUs; on {count(machine.ranks, machine.unit)}"
            " every step is taken in micro-batches,\nits losses normalised over the whole step: "
            "the same training, to rounding."
        )
    if reproduction.form == "full" and machine.device == "cpu":
        yield "A CPU needs weeks for the full form; --images-seen cuts it, --form small is for it."
    if reproduction.form == "full" and reproduction.settings["--images-seen"] is not None:
        yield (
            "Warm-up and learning-rate drops are cut in proportion; results of a cut training "
            "cannot reach the published ones."
        )


def _train(planned: PlannedExperiment, datasets: Path) -> None:
    try:
        run_command(planned.arguments, datasets)
    except D2ScaleError as error:
        text = f"experiment {planned.experiment.title}: {error}"
        raise D2ScaleError(f"{text}; the same command goes on where it stopped") from error
    if not is_finished(planned.folder):
        raise D2ScaleError(f"{planned.folder} holds no result of the training that has just ended")


def _results(reproduction: Reproduction) -> Iterator[str]:
    experiments = reproduction.experiments
    yield f"\nThe experiments side by side\n\n{result_table(experiments)}"
    for verdict in (loss_verdicts(experiments), rule_verdict(experiments)):
        if verdict:
            yield f"\n{verdict}"
    # The report shows detections on images of the validation data.
    with datasets_under(reproduction.data.root):
        folders = [planned.folder for planned in experiments]
        files = write_report(folders, reproduction.folder / REPORT, published=True)
    yield f"\nReport: {Path(files.html).absolute()}"
