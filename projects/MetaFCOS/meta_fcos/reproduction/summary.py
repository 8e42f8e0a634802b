"""The tables that a reproduction prints before its trainings and after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from tabulate import tabulate

from d2scale.coco.accumulate import METRICS
from d2scale.report.formatting import show_metric
from d2scale.report.history import History, read_history
from meta_fcos.reproduction.experiments import BASELINE, GAIN, LARGE_BATCH
from meta_fcos.reproduction.final_loss import NOISE_ERRORS, FinalLoss, compare, final_loss
from meta_fcos.reproduction.planned_experiment import PlannedExperiment, standing

_RULES = {
    BASELINE: "batch of the recipe",
    LARGE_BATCH: "large batch by the linear rule, as published",
    GAIN: "large batch by the gain rule",
}


def plan_table(experiments: Sequence[PlannedExperiment]) -> str:
    """Return what will run, one column an experiment."""
    return _table({planned.experiment.title: _plan_column(planned) for planned in experiments})


def _plan_column(planned: PlannedExperiment) -> dict[str, str]:
    plan, machine, experiment = planned.plan, planned.machine, planned.experiment
    solver, rule = plan.apply(planned.cfg).SOLVER, planned.cfg.D2SCALE.LR_RULE
    published = f"{count(experiment.gpus, 'GPU')}, in {experiment.time}"
    column = {
        "published on": published if experiment.time else "",
        "runs on": count(plan.world_size, machine.unit),
        "a step on each": f"{plan.accumulation_steps} x {plan.ims_per_gpu} images",
        "total batch": str(plan.ims_per_batch),
        "LR_RULE": "" if rule == "auto" else rule,
        "BASE_LR": f"{solver.BASE_LR:g}",
        "WARMUP_ITERS": str(solver.WARMUP_ITERS),
        "STEPS": ", ".join(map(str, solver.STEPS)),
        "MAX_ITER": str(solver.MAX_ITER),
        "optimizer steps": _span(plan.steps),
        "images seen": _span([steps * plan.ims_per_batch for steps in plan.steps]),
    }
    if plan.predicted_peak_gib is not None and machine.gib is not None:
        column["predicted memory"] = f"{plan.predicted_peak_gib:.1f} of {machine.gib:.1f} GiB"
    return {**column, "standing": standing(planned.folder)}


def _span(ends: Sequence[int]) -> str:
    """Return ``250``, or ``125 to 250`` where the noise of the gradient will tell."""
    return " to ".join(map(str, dict.fromkeys(ends)))


def count(number: int, what: str) -> str:
    """Return ``2 GPUs``, ``1 process`` and so on."""
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    return f"{number} {what if number == 1 else plural}"


def result_table(experiments: Sequence[PlannedExperiment]) -> str:
    """Return settings and results of finished experiments, one column each."""
    return _table({planned.experiment.title: _result_column(planned) for planned in experiments})


def _result_column(planned: PlannedExperiment) -> dict[str, str]:
    history = read_history(planned.folder, planned.plan.ims_per_batch)
    loss = _final_loss(history)
    _, seconds = history.curve("time")
    return {
        "total batch": str(planned.plan.ims_per_batch),
        "MAX_ITER": str(planned.cfg.SOLVER.MAX_ITER),
        "optimizer steps": f"{history.rows[-1].steps:.0f}" if history.rows else "",
        "images seen": f"{history.rows[-1].images_seen:.0f}" if history.rows else "",
        "seconds a step": f"{median(seconds):.3f}" if len(seconds) else "",
        "final total_loss": "" if loss is None else str(loss),
        **{name: show_metric(history.last(f"bbox/{name}")) for name in METRICS},
    }


def loss_verdicts(experiments: Sequence[PlannedExperiment]) -> str:
    """Return whether the final losses agree with the baseline's, a line each; empty without it."""
    losses = {}
    for planned in experiments:
        history = read_history(planned.folder, planned.plan.ims_per_batch)
        losses[planned.experiment] = _final_loss(history)
    (first, baseline), *others = losses.items()
    if first != BASELINE or baseline is None or not others:
        return ""
    lines = [
        f"final loss of {experiment.title} against {first.title}: {compare(loss, baseline)}"
        for experiment, loss in others
        if loss is not None
    ]
    lines.append(
        "(the mean over the last sixth of the iterations ± its standard error, of which up to "
        f"{NOISE_ERRORS:g} count as noise)"
    )
    return "\n".join(lines)


def _final_loss(history: History) -> FinalLoss | None:
    iterations, losses = history.curve("total_loss", "iterations")
    return final_loss(iterations.tolist(), losses.tolist())


def rule_verdict(experiments: Sequence[PlannedExperiment]) -> str:
    """Return what either rule makes of the large batch, a line each; empty unless both have run."""
    planned_of = {planned.experiment: planned for planned in experiments}
    if not _RULES.keys() <= planned_of.keys():
        return ""
    lines, baseline = [], None
    for experiment, what in _RULES.items():
        ims_per_batch = planned_of[experiment].plan.ims_per_batch
        history = read_history(planned_of[experiment].folder, ims_per_batch)
        ap = history.last("bbox/AP") or 0.0
        baseline = ap if baseline is None else baseline
        steps = f"{history.rows[-1].steps:.0f} steps of {ims_per_batch} images"
        lines.append(f"{what}: AP {ap:.1f} ({ap - baseline:+.1f}) after {steps}")
    return "\n".join(lines)


def _table(columns: Mapping[str, Mapping[str, str]]) -> str:
    names = next(iter(columns.values())).keys()
    rows = [(name, *(column.get(name, "") for column in columns.values())) for name in names]
    return tabulate(rows, headers=["", *columns], tablefmt="pipe", disable_numparse=True)
