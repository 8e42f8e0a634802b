"""The published comparison, run on the machine at hand: three trainings and a report."""

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
from meta_fcos.reproduction.process import run_command
from meta_fcos.reproduction.request import Decision, Request, decide_all
from meta_fcos.reproduction.runs import Run, is_finished
from meta_fcos.reproduction.tables import count, loss_verdicts, plan_table, result_table

REPORT = "report.html"


def reproduce(request: Request, *, only_plan: bool = False) -> Iterator[str]:
    """Check, plan, train and report, yielding what a reader should see as it becomes known.

    Experiments that are finished in the folder are not run again; one that was stopped goes on
    from its last checkpoint.

    Args:
        request: what is asked for.
        only_plan: end with the plan, with nothing written.

    Raises:
        ConfigError: with every fault of request, folder, data and weights, before anything is
            written.
        D2ScaleError: for what goes wrong later.
        KeyboardInterrupt: Ctrl-C, after all processes have ended.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackageError("matplotlib", "the report", "pip install 'd2scale[train]'")
    decision = decide_all(request)
    yield describe(decision)
    if only_plan:
        return
    claim(decision.folder, decision.settings)
    with run_lock(decision.folder):
        make(decision.data, decision.subset)
        for run in decision.to_train():
            yield f"\nExperiment {run.experiment.title}\n$ d2scale {shlex.join(run.arguments)}"
            _train(run, decision.data.root)
        yield from _results(decision)


def describe(decision: Decision) -> str:
    """Return the plan of a reproduction for a reader."""
    forms = {"full": "as published", "small": "in the small form for a CPU"}
    counted = decision.training_images
    images = f", {counted} training images with boxes" if counted else ""
    lines = [
        f"The published experiments {forms[decision.form]}; this machine: {decision.machine.name}",
        f"Folder: {decision.folder.absolute()}",
        f"Data: {decision.data.text}{images}",
        *_notes(decision),
    ]
    return "\n".join(lines) + "\n\n" + plan_table(decision.runs)


def _notes(decision: Decision) -> Iterator[str]:
    equivalents = [run.experiment.title for run in decision.runs if run.is_equivalent()]
    if equivalents:
        here = count(decision.machine.ranks, decision.machine.unit)
        yield (
            f"{' and '.join(equivalents)}: published on two GPUs; on {here} every step is taken in "
            "micro-batches,\nits losses normalised over the whole step: the same training, to "
            "rounding."
        )
    if decision.form == "full" and decision.machine.device == "cpu":
        yield "A CPU needs weeks for the full form; --images-seen cuts it, --form small is for it."
    if decision.form == "full" and decision.settings["--images-seen"] is not None:
        yield (
            "Warm-up and learning-rate drops are cut in proportion; results of a cut training "
            "cannot reach the published ones."
        )


def _train(run: Run, datasets: Path) -> None:
    try:
        run_command(run.arguments, datasets)
    except D2ScaleError as error:
        title = run.experiment.title
        raise D2ScaleError(
            f"experiment {title}: {error}; the same command goes on where it stopped"
        ) from error
    if not is_finished(run.folder):
        raise D2ScaleError(f"{run.folder} holds no result of the training that has just ended")


def _results(decision: Decision) -> Iterator[str]:
    runs = decision.finished()
    verdicts = loss_verdicts(runs)
    yield f"\nThe experiments side by side\n\n{result_table(runs)}" + (
        f"\n\n{verdicts}" if verdicts else ""
    )
    # The report shows detections on images of the validation data.
    with datasets_under(decision.data.root):
        folders = [run.folder for run in runs]
        files = write_report(folders, decision.folder / REPORT, published=True)
    yield f"\nReport: {Path(files.html).absolute()}"
