import json
import math

import pytest
from torch.utils.tensorboard import SummaryWriter

from d2scale.report.history import read_history
from run_folders import gain_lines


def write(folder, lines, rest=""):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.json").write_text(text + rest)


def test_curves_against_every_axis(tmp_path):
    write(
        tmp_path,
        [
            {"iteration": 1, "images_seen": 8, "elapsed_seconds": 3.5, "total_loss": 2.0},
            {"iteration": 3, "images_seen": 16, "elapsed_seconds": 7.0, "total_loss": 1.0},
        ],
    )
    history = read_history(tmp_path, 4)
    assert history.notes == ()
    for axis, places in (("images", [8, 16]), ("iterations", [2, 4]), ("time", [3.5, 7])):
        found = history.curve("total_loss", axis)
        assert [each.tolist() for each in found] == [places, [2, 1]]


def test_a_half_written_last_line_is_named_and_left_out(tmp_path):
    lines = [{"iteration": i, "images_seen": i + 1, "total_loss": 1.0} for i in range(3)]
    write(tmp_path, lines, '{"iteration": 3, "tot')
    history = read_history(tmp_path, 1)
    assert [row.iteration for row in history.rows] == [0, 1, 2]
    assert "metrics.json: line 4 cannot be read and left out" in history.notes


@pytest.mark.parametrize(
    "line",
    ["[1, 2]", "3", '{"total_loss": 1}', '{"iteration": null}', '{"iteration": 1e999}', "\x00"],
)
def test_lines_of_another_form_are_left_out(tmp_path, line):
    good = {"iteration": 0, "images_seen": 4, "elapsed_seconds": 1, "total_loss": 1}
    write(tmp_path, [good], line + "\n")
    history = read_history(tmp_path, 4)
    assert len(history.rows) == 1
    assert history.notes == ("metrics.json: line 2 cannot be read and left out",)


def test_images_are_computed_where_detectron2_does_not_report_them(tmp_path):
    write(tmp_path, [{"iteration": 19, "total_loss": 1.0, "time": 0.5}])
    history = read_history(tmp_path, 4)
    assert history.rows[0].images_seen == 80
    assert history.rows[0].seconds == 10
    assert any("steps times IMS_PER_BATCH" in note for note in history.notes)
    assert any("sum of the step times" in note for note in history.notes)
    unknown = read_history(tmp_path, None)
    assert len(unknown.curve("total_loss", "images")[0]) == 0
    assert unknown.curve("total_loss", "iterations")[0].tolist() == [20]
    assert any("no axis of images" in note for note in unknown.notes)


def test_steps_that_a_resumed_run_repeated_are_counted_once(tmp_path):
    lines = [{"iteration": i, "total_loss": float(i)} for i in (0, 1, 2, 3)]
    lines += [{"iteration": i, "total_loss": 10.0 + i} for i in (2, 3, 4)]
    write(tmp_path, lines)
    history = read_history(tmp_path, 1)
    assert history.curve("total_loss", "iterations")[1].tolist() == [0, 1, 12, 13, 14]
    assert any("repeated" in note for note in history.notes)


def test_a_run_that_moved_to_another_batch_is_one_story(tmp_path):
    # 16 images in 4 steps of 4; then the rest in steps of 8, whose numbers are smaller.
    lines = [{"iteration": i, "images_seen": 4 * (i + 1), "total_loss": 1.0} for i in range(4)]
    lines += [{"iteration": 2, "images_seen": 24, "total_loss": 1.0}]
    write(tmp_path, lines)
    history = read_history(tmp_path, 8)
    assert [row.images_seen for row in history.rows] == [4, 8, 12, 16, 24]


def test_detectron2s_evaluations_take_their_place(tmp_path):
    # As detectron2 writes them: late, and after the end with a number that no step has.
    write(
        tmp_path,
        [
            {"iteration": 11, "total_loss": 1.0, "lr": 0.1},
            {"iteration": 19, "total_loss": 2.0, "lr": 0.1},
            {"iteration": 11, "bbox/AP": 1.0},
            {"iteration": 20, "bbox/AP": 2.0},
        ],
    )
    history = read_history(tmp_path, 4)
    assert [(row.iteration, row.values["bbox/AP"]) for row in history.rows] == [(11, 1), (19, 2)]
    assert history.rows[-1].images_seen == 80
    assert not any("repeated" in note for note in history.notes)


def test_null_and_nan_are_no_points_but_known_names(tmp_path):
    text = '{"iteration": 0, "total_loss": NaN, "lr": 1e308, "bbox/AP-dog": null, "bbox/AP": 1.0}\n'
    (tmp_path / "metrics.json").write_text(text)
    history = read_history(tmp_path, 1)
    assert math.isnan(history.rows[0].values["bbox/AP-dog"])
    assert (history.last("total_loss"), history.last("lr")) == (None, None)
    assert (history.last("bbox/AP"), history.largest("bbox/AP")) == (1.0, 1.0)


def test_tensorboard_events_where_there_is_no_metrics_file(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    for step in (1, 3):
        writer.add_scalar("total_loss", 1.0 / (step + 1), step)
        writer.add_scalar("time", 0.5, step)
    writer.add_scalar("bbox/AP", float("nan"), 4)
    writer.close()
    history = read_history(tmp_path, 4)
    places, values = history.curve("total_loss")
    assert (places.tolist(), values.tolist()) == ([8, 16], [0.5, 0.25])
    assert "TensorBoard events are read instead" in history.notes[0]
    # Its clock is the wall's.
    seconds, _ = history.curve("total_loss", "time")
    assert seconds[0] == 0
    assert 0 <= seconds[1] < 60


def test_events_that_are_no_events(tmp_path):
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"nothing of the kind" * 9)
    assert read_history(tmp_path, 4).rows == ()


def test_an_empty_folder_has_no_rows(tmp_path):
    assert read_history(tmp_path, 4).rows == ()


def without(lines, *names):
    return [{key: value for key, value in line.items() if key not in names} for line in lines]


def test_by_the_gain_rule_steps_are_not_iterations(tmp_path):
    write(tmp_path, gain_lines())
    history = read_history(tmp_path, 16)
    last = history.rows[-1]
    assert (last.iteration, last.steps, last.images_seen) == (19, 16, 256)
    assert history.curve("gain", "iterations")[0][-1] == 20
    assert "steps" not in last.values
    # Where neither is recorded, images and seconds are those of the steps, not of the iterations.
    write(tmp_path, without(gain_lines(), "images_seen", "elapsed_seconds"))
    assert read_history(tmp_path, 16).rows[-1][2:4] == (256, 8.0)


def test_an_evaluation_by_the_gain_rule_stands_where_its_iteration_was(tmp_path):
    # As detectron2 writes it: without steps, late, and after the end with one more iteration.
    evaluations = [{"iteration": 9, "bbox/AP": 1.0}, {"iteration": 20, "bbox/AP": 2.0}]
    for lines in (gain_lines(), without(gain_lines(), "images_seen")):
        write(tmp_path, [*lines, *evaluations])
        history = read_history(tmp_path, 16)
        places, values = history.curve("bbox/AP")
        assert (places.tolist(), values.tolist()) == ([128, 256], [1, 2])
        assert history.rows[-1].values["gain"] == 1.25
        assert any("IMS_PER_BATCH" in note for note in history.notes) == (lines != gain_lines())


def test_an_infinite_noise_scale_is_no_point(tmp_path):
    lines = gain_lines(8)
    lines[1]["noise_scale"] = None
    write(tmp_path, lines)
    assert len(read_history(tmp_path, 16).curve("noise_scale")[1]) == 3
