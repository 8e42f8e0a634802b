import math

from d2scale.report.log_file import read_log

DETECTRON2 = """\
[09/02 03:00:00] detectron2 INFO: Rank of current process: 0. World size: 2
[09/02 03:00:01] d2.utils.events INFO:  eta: 1:00:00  iter: 19  total_loss: 2  max_mem: 7000M
[09/02 03:00:02] d2.utils.events INFO:  eta: 1:00:00  iter: 39  total_loss: 2  max_mem: 6500M
|  AP   |  AP50  |
|:-----:|:------:|
| 1.000 | 2.000  |
[09/02 03:46:48] d2 INFO: Overall training speed: 98 iterations in 1:05:49 (1.3317 s / it)
[09/02 03:46:48] d2.engine.hooks INFO: Total training time: 11:17:36 (0:11:47 on hooks)
[09/02 03:52:09] d2.evaluation.coco_evaluation INFO: Evaluation results for bbox:
|   AP   |  AP50  |  AP75  |  APs  |
|:------:|:------:|:------:|:-----:|
| 32.887 | 50.833 | 35.163 |  nan  |
[09/02 03:52:09] d2.evaluation.coco_evaluation INFO: Per-category bbox AP:
| category   | AP     | category      | AP     |
|:-----------|:-------|:--------------|:-------|
| truck      | 25.783 | traffic light | 24.838 |
| hair drier | nan    |               |        |
"""

D2GO = """\
| config key           | old value | new value |
|:---------------------|:----------|:----------|
| SOLVER.BASE_LR       | 0.01      | 0.02      |
| SOLVER.IMS_PER_BATCH | 4         | 8         |
| SOLVER.STEPS         | (8,)      | (4,)      |
"""


def test_detectron2s_log(tmp_path):
    (tmp_path / "log.txt").write_text(DETECTRON2)
    facts = read_log(tmp_path)
    assert facts.results.pop("APs") != facts.results.get("APs")
    assert facts.results == {"AP": 32.887, "AP50": 50.833, "AP75": 35.163}
    assert math.isnan(facts.class_results.pop("hair drier"))
    assert facts.class_results == {"truck": 25.783, "traffic light": 24.838}
    assert facts.total_seconds == (11 * 60 + 17) * 60 + 36
    assert facts.seconds_per_iteration == 1.3317
    assert (facts.world_size, facts.max_memory_mib) == (2, 7000)


def test_numbers_that_are_none_are_left_out(tmp_path):
    many = "9" * 5000
    (tmp_path / "log.txt").write_text(
        f"Overall training speed: 98 iterations in 1:05:49 (1.2.3 s / it)\n"
        f"Total training time: {many}:00:05\nWorld size: {many}\nmax_mem: {many}M\n"
        "| config key | old value | new value |\n|:--|:--|:--|\n"
        f"| SOLVER.STEPS | 1 | {'(' * 3000} |\n"
    )
    facts = read_log(tmp_path)
    assert (facts.seconds_per_iteration, facts.total_seconds) == (None, None)
    assert (facts.world_size, facts.max_memory_mib) == (None, None)


def test_days_of_training(tmp_path):
    (tmp_path / "log.txt").write_text("Total training time: 2 days, 1:00:05 (0:00:01 on hooks)\n")
    assert read_log(tmp_path).total_seconds == 49 * 3600 + 5


def test_d2gos_scaled_keys(tmp_path):
    (tmp_path / "log.txt").write_text(D2GO)
    assert read_log(tmp_path).scaled == {
        "SOLVER.BASE_LR": 0.02,
        "SOLVER.IMS_PER_BATCH": 8,
        "SOLVER.STEPS": (4,),
    }


def test_d2scales_log(tmp_path):
    (tmp_path / "log.txt").write_text("d2scale 0.1.0, torch 2.4, processes: 4, device: cpu\n")
    assert read_log(tmp_path).world_size == 4


def test_no_log_and_a_log_that_is_no_text(tmp_path):
    assert read_log(tmp_path).results == {}
    (tmp_path / "log.txt").write_bytes(b"\xff\xfe|\x00|\n| AP | AP50 |\n| x | y | z |\n|")
    assert read_log(tmp_path).results == {}
