from __future__ import annotations

import math

import pytest
import torch

from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.engine.hooks import CheckpointHook, EvaluationHook
from d2scale.engine.telemetry.metrics import StepMetrics
from d2scale.engine.telemetry.reporter import Reporter
from d2scale.errors import D2ScaleError
from d2scale.step.clock import StepClock
from standins import StandIn

CPU = torch.device("cpu")


class Sampler:
    def state_dict(self):
        return {"position": 7}


class Remembering:
    """A writer that remembers."""

    def __init__(self):
        self.lines = []

    def write(self, iteration, scalars):
        self.lines.append((iteration, dict(scalars)))

    def close(self):
        pass


def step(iteration, iterations_before=None, iterations=None):
    """A step; by default it is worth one iteration."""
    before = iteration if iterations_before is None else iterations_before
    done = iteration + 1 if iterations is None else iterations
    number = iteration + 1
    return StepMetrics(iteration, {"loss": 1.0}, 0.1, 0.5, 0.1, 4 * number, before, done, number)


def saved_names(folder, period, max_iter=10, model=None):
    checkpointer = RunCheckpointer(model or StandIn(), str(folder))
    save = CheckpointHook(checkpointer, Sampler(), StepClock(), period=period, max_iter=max_iter)
    for iteration in range(max_iter):
        save(step(iteration))
    return sorted(path.name for path in folder.glob("*.pth"))


def test_checkpoints_have_detectron2s_names(tmp_path):
    assert saved_names(tmp_path, period=4) == [
        "model_0000003.pth",
        "model_0000007.pth",
        "model_final.pth",
    ]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    content = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    assert (content["iteration"], content["images_seen"]) == (3, 16)
    assert content["sampler"] == {"position": 7}


def test_period_of_zero_saves_only_the_last(tmp_path):
    assert saved_names(tmp_path, period=0) == ["model_final.pth"]


def test_broken_weights_do_not_replace_a_good_checkpoint(tmp_path):
    model = StandIn()
    saved_names(tmp_path, period=4, max_iter=5, model=model)
    with torch.no_grad():
        model.score.bias.fill_(math.nan)
    before = (tmp_path / "model_final.pth").read_bytes()
    with pytest.raises(D2ScaleError, match=r"not finite after iteration 3 .*score\.bias"):
        saved_names(tmp_path, period=4, max_iter=5, model=model)
    assert (tmp_path / "model_final.pth").read_bytes() == before


def test_evaluation_comes_in_between_and_not_at_the_end():
    writer = Remembering()
    reporter = Reporter([writer], CPU, period=1, start_iteration=0, max_iter=8)
    evaluation = EvaluationHook(lambda: {"bbox/AP": 1.0}, reporter, period=4, max_iter=8)
    for iteration in range(8):
        evaluation(step(iteration))
    assert writer.lines == [(3, {"bbox/AP": 1.0, "images_seen": 16})]
    assert evaluation.evaluate(7, images_seen=32) == {"bbox/AP": 1.0}
    assert writer.lines[1:] == [(7, {"bbox/AP": 1.0, "images_seen": 32})]


def test_no_evaluation_without_a_period_or_results():
    writer = Remembering()
    reporter = Reporter([writer], CPU, period=1, start_iteration=0, max_iter=8)
    EvaluationHook(lambda: {"bbox/AP": 1.0}, reporter, period=0, max_iter=8)(step(3))
    assert EvaluationHook(dict, reporter, period=4, max_iter=8).evaluate(3, images_seen=16) == {}
    assert writer.lines == []


def test_reports_every_period_and_at_the_end():
    writer = Remembering()
    reporter = Reporter([writer], CPU, period=3, start_iteration=0, max_iter=8)
    for iteration in range(8):
        reporter(step(iteration))
    assert [iteration for iteration, _ in writer.lines] == [2, 5, 7]
    assert writer.lines[0][1]["images_seen"] == 12


def test_memory_of_the_device_is_reported_and_none_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**20)
    found = []
    for device in (torch.device("cuda", 0), CPU):
        writer = Remembering()
        with Reporter([writer], device, period=1, start_iteration=0, max_iter=1) as reporter:
            reporter(step(0))
        ((_, scalars),) = writer.lines
        found.append({name: value for name, value in scalars.items() if name.startswith("max_")})
    assert found == [{"max_mem_mb": 3.0, "max_reserved_mb": 5.0}, {}]
