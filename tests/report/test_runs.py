import json
import math

import pytest

from d2scale.report.runs import read_run
from run_folders import GAIN_CONFIG, GAIN_PLAN, gain_lines, step_lines


def test_a_run_of_d2scale(make_run):
    folder = make_run(
        lines=step_lines(max_mem_mb=2048.0, max_reserved_mb=3072.0),
        results={"AP": 32.5, "AP50": 50.0, "AP-dog": 40.0, "AP-cat": None},
        machine={"description": "a machine", "device_memory_mb": 16384.0},
    )
    run = read_run(folder, "mine")
    assert (run.name, run.engine, run.world_size, run.ims_per_batch) == ("mine", "d2scale", 2, 8)
    assert run.test_set == "coco_pretrain_val_base"
    assert run.results == {"AP": 32.5, "AP50": 50.0}
    assert run.class_results["dog"] == 40
    assert math.isnan(run.class_results["cat"])
    assert (run.images_seen, run.images_per_second) == (160, 16)
    # The evaluation after the last step, at 99 seconds, is no training.
    assert run.total_seconds == 10
    assert run.max_memory_mib == 2048
    assert run.machine["description"] == "a machine"
    assert run.notes == ()


def test_results_of_an_evaluation_before_the_end_are_reported_as_such(make_run):
    early = {"iteration": 5, "images_seen": 48, "elapsed_seconds": 3, "bbox/AP": 10.0}
    lines = [*step_lines(), early]
    run = read_run(make_run(lines=lines), "run")
    assert run.results == {"AP": 10.0}
    assert any("iteration 6" in note for note in run.notes)


def test_a_run_of_d2go_takes_scaled_keys_and_the_last_results_from_the_log(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "SOLVER: {IMS_PER_BATCH: 4, REFERENCE_WORLD_SIZE: 1}\n"
        "D2GO_DATA: {TEST: {MAX_IMAGES: 8}}\nDATASETS: {TEST: [coco_2017_val]}\n"
    )
    name = "coco_2017_val_frontmost8"
    lines = [
        {"iteration": 3, "total_loss": 2.0, "lr": 0.1, f"default/{name}/bbox/AP": 1.0},
        {"iteration": 5, "total_loss": 1.0, "lr": 0.1},
    ]
    (tmp_path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "log.txt").write_text(
        "| config key | old value | new value |\n|:--|:--|:--|\n"
        "| SOLVER.IMS_PER_BATCH | 4 | 8 |\n| SOLVER.REFERENCE_WORLD_SIZE | 1 | 2 |\n\n"
        "|  AP   |  AP50  |\n|:-----:|:------:|\n| 3.000 | 4.000 |\n"
    )
    (tmp_path / "inference" / "default" / "final" / name).mkdir(parents=True)
    run = read_run(tmp_path, "run")
    assert (run.engine, run.ims_per_batch, run.world_size, run.images_seen) == ("d2go", 8, 2, 48)
    assert run.results == {"AP": 3.0, "AP50": 4.0}
    assert run.test_set == name


def test_of_several_test_sets_one_is_reported(make_run):
    lines = step_lines()
    last = {"iteration": 19, "images_seen": 160, "a/bbox/AP": 1.0, "b/bbox/AP": 2.0}
    run = read_run(make_run(lines=[*lines, last]), "run")
    assert (run.results, run.test_set) == ({"AP": 1.0}, "a")
    assert any("several test sets" in note for note in run.notes)


def test_ranks_are_counted_by_their_logs_where_nothing_else_has_them(tmp_path):
    (tmp_path / "config.yaml").write_text("SOLVER: {IMS_PER_BATCH: 4}\n")
    for rank in (1, 10, 2):
        (tmp_path / f"log.txt.rank{rank}").touch()
    run = read_run(tmp_path, "run")
    assert (run.engine, run.world_size) == ("detectron2", 11)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "SOLVER: [unclosed"),
        ("config.yaml", "!!python/object/apply:os.system ['true']"),
        ("plan.json", "{half"),
        ("plan.json", "[1]"),
        ("machine.json", "\x00"),
    ],
)
def test_a_broken_file_is_named_and_the_rest_is_read(make_run, name, content):
    folder = make_run(machine={"description": "x"})
    (folder / name).write_text(content)
    run = read_run(folder, "run")
    assert len(run.history.rows) == 10
    assert any(name in note for note in run.notes)


def test_an_empty_folder(tmp_path):
    run = read_run(tmp_path, "run")
    assert (run.engine, run.results, run.history.rows) == ("unknown", {}, ())
    assert any("config.yaml" in note for note in run.notes)


def gain_run(make_run, lines=None, **settings):
    config = {**GAIN_CONFIG, **settings}
    return read_run(make_run("gain", lines or gain_lines(), config=config, plan=GAIN_PLAN), "gain")


def test_a_run_by_the_gain_rule(make_run):
    run = gain_run(make_run)
    assert (run.steps, run.images_seen, run.recipe_images) == (16, 256, 160)
    assert run.efficiency == 0.625
    assert (run.planned_steps, run.planned_images) == ((10, 20), (160, 320))
    assert (run.seconds_per_step, run.images_per_second) == (0.5, 32)


def test_a_run_by_the_gain_rule_that_has_not_ended_or_not_begun(make_run):
    assert gain_run(make_run, gain_lines(8)).efficiency == 0.625
    run = read_run(make_run("none", [], config=GAIN_CONFIG), "none")
    assert (run.steps, run.images_seen, run.efficiency) == (None, None, None)


def test_without_the_gain_rule_there_is_no_efficiency(make_run):
    run = read_run(make_run(lines=step_lines(noise_scale=5.0)), "run")
    assert (run.efficiency, run.recipe_images, run.planned_steps) == (None, 160, (20, 20))


def test_d2gos_speed_is_not_that_of_a_step_by_the_gain_rule(make_run):
    folder = make_run("d2go", gain_lines(), config={**GAIN_CONFIG, "D2GO_DATA": {"X": 1}})
    speed = "Overall training speed: 20 iterations in 0:00:08 (0.4000 s / it)\n"
    (folder / "log.txt").write_text(speed)
    assert read_run(folder, "d2go").seconds_per_step == 0.5
