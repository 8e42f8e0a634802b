from __future__ import annotations

import json
import logging

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2scale.engine.telemetry import logs, reporter
from d2scale.engine.telemetry.logs import logging_to
from d2scale.engine.telemetry.metrics import MetricHistory, StepMetrics
from d2scale.engine.telemetry.reporter import Reporter
from d2scale.engine.telemetry.writers import JsonWriter, TensorBoardWriter

CPU = torch.device("cpu")


def step(iteration, loss=1.0, seconds=0.5):
    return StepMetrics(
        iteration=iteration,
        losses={"loss_cls": loss, "loss_loc": 2 * loss},
        lr=0.01,
        seconds=seconds,
        data_seconds=0.1,
        images_seen=4 * (iteration + 1),
        iterations_before=iteration,
        iterations=iteration + 1,
        steps=iteration + 1,
    )


def read_lines(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def test_scalars_are_medians_over_the_window():
    history = MetricHistory(window=3, max_iter=10)
    for iteration, loss in enumerate((100.0, 1.0, 5.0, 2.0)):
        history.add(step(iteration, loss, seconds=iteration + 1.0))
    assert history.scalars() == {
        "total_loss": 6.0,
        "loss_cls": 2.0,
        "loss_loc": 4.0,
        "time": 3.0,
        "data_time": 0.1,
        "lr": 0.01,
        "eta_seconds": 2.5 * 6,
        "images_seen": 16,
        "steps": 4,
    }


def test_line_looks_like_detectron2():
    history = MetricHistory(window=20, max_iter=10)
    history.add(step(0))
    history.add(step(1, seconds=1.5))
    assert history.line({"max_mem_mb": 123.4}) == (
        " eta: 0:00:08  iter: 1  total_loss: 3  loss_cls: 1  loss_loc: 2  time: 1.0000  "
        "last_time: 1.5000  data_time: 0.1000  last_data_time: 0.1000  lr: 0.01  max_mem: 123M"
    )


def test_json_lines(tmp_path):
    writer = JsonWriter(tmp_path)
    writer.write(19, {"total_loss": 1.5})
    writer.write(39, {"bbox/AP": float("nan")})
    writer.close()
    first, second = read_lines(tmp_path)
    assert 0 <= first.pop("elapsed_seconds") <= second.pop("elapsed_seconds") < 60
    assert first == {"iteration": 19, "total_loss": 1.5}
    assert second == {"iteration": 39, "bbox/AP": None}


def test_seconds_go_on_where_the_last_line_that_stays_stands(tmp_path):
    lines = [
        {"iteration": 0, "elapsed_seconds": 100.0},
        {"iteration": 1, "elapsed_seconds": 200.0},
        {"iteration": 2, "elapsed_seconds": 300.0},
    ]
    path = tmp_path / "metrics.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    writer = JsonWriter(tmp_path, start_iteration=2)
    writer.write(2, {"total_loss": 2.0})
    writer.close()
    assert 200 <= read_lines(tmp_path)[-1]["elapsed_seconds"] < 260


@pytest.mark.parametrize("before", ['"iteration": 0', '"iteration": 0, "elapsed_seconds": null'])
def test_seconds_begin_anew_where_nobody_counted(tmp_path, before):
    (tmp_path / "metrics.json").write_text("{" + before + "}\n")
    writer = JsonWriter(tmp_path, start_iteration=1)
    writer.write(1, {"total_loss": 2.0})
    writer.close()
    assert read_lines(tmp_path)[-1]["elapsed_seconds"] < 60


def test_resumed_run_tells_one_story(tmp_path):
    # A run was killed at iteration 12, inside a line, and goes on from its checkpoint at 10.
    path = tmp_path / "metrics.json"
    lines = [json.dumps({"iteration": i, "total_loss": 1.0}) + "\n" for i in (8, 9, 10, 11)]
    path.write_text("".join(lines) + '{"iteration": 12, "tot')
    writer = JsonWriter(tmp_path, start_iteration=10)
    writer.write(10, {"total_loss": 2.0})
    writer.close()
    assert [(line["iteration"], line["total_loss"]) for line in read_lines(tmp_path)] == [
        (8, 1.0),
        (9, 1.0),
        (10, 2.0),
    ]


def test_tensorboard_events(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(4, {"total_loss": 1.5, "bbox/AP": 30.0})
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("bbox/AP")] == [(4, 30.0)]
    assert [(e.step, e.value) for e in events.Scalars("total_loss")] == [(4, 1.5)]


def test_reports_hold_what_all_ranks_agreed_on(tmp_path, caplog, monkeypatch):
    of_all_ranks = {"time": 9.0, "max_mem_mb": 5.0}
    monkeypatch.setattr(reporter, "largest_over_ranks", lambda values: of_all_ranks)
    with (
        caplog.at_level(logging.INFO),
        Reporter([JsonWriter(tmp_path)], CPU, period=2, start_iteration=0, max_iter=4) as report,
    ):
        report(step(0))
        report(step(1))
        report.write(1, {"bbox/AP": 3.0})
    first, second = read_lines(tmp_path)
    assert (first["time"], first["max_mem_mb"], first["total_loss"]) == (9.0, 5.0, 3.0)
    assert (second["iteration"], second["bbox/AP"]) == (1, 3.0)
    assert "total_loss" not in second
    assert "iter: 1  total_loss: 3" in caplog.text


@pytest.fixture
def terminal(monkeypatch):
    for module in (logs, reporter):
        monkeypatch.setattr(module, "on_terminal", lambda: True)


def test_log_file_and_standard_output(tmp_path, capsys):
    with logging_to(tmp_path, rank=0):
        logging.getLogger("d2scale.engine.run").info("told %d", 1)
        logging.getLogger("elsewhere").info("not told")
        logging.getLogger("elsewhere").warning("warned")
    logging.getLogger("d2scale.engine.run").warning("after the run")
    shown = capsys.readouterr().out
    for text in (shown, (tmp_path / "log.txt").read_text()):
        assert "] d2scale.engine.run INFO: told 1\n" in text
        assert "elsewhere WARNING: warned" in text
        assert "not told" not in text
        assert "after the run" not in text


def test_other_ranks_log_to_their_own_file(tmp_path, capsys):
    with logging_to(tmp_path, rank=1):
        logging.getLogger("d2scale").info("told")
    assert capsys.readouterr().out == ""
    assert "told" in (tmp_path / "log.txt.rank1").read_text()


def test_terminal_shows_a_bar_instead_of_metric_lines(tmp_path, capsys, terminal):
    with (
        logging_to(tmp_path, rank=0),
        Reporter([], CPU, period=1, start_iteration=2, max_iter=4) as report,
    ):
        logging.getLogger("d2scale").info("told")
        report(step(2))
        report(step(3))
    shown = capsys.readouterr()
    assert "4/4" in shown.err
    assert "loss=3" in shown.err
    assert "told" in shown.out
    assert "total_loss" not in shown.out
    assert "total_loss" in (tmp_path / "log.txt").read_text()
