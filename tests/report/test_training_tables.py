import pytest

from d2scale.report.comparison import evaluate_runs
from d2scale.report.formatting import show_duration, show_metric, show_number
from d2scale.report.published import read_published
from d2scale.report.result_tables import results_section, summary_lines
from d2scale.report.runs import read_run
from d2scale.report.training_tables import settings_section, throughput_section, time_saved
from run_folders import GAIN_CONFIG, GAIN_PLAN, detections, gain_lines, step_lines


def column(table, number):
    """Return a column as a dict, by the first."""
    return {row[0].text: row[number].text for row in table.rows}


@pytest.fixture
def runs(make_run):
    machine = {"description": "2 x Some GPU", "device_memory_mb": 16384.0}
    memory = {"max_mem_mb": 8192.0, "max_reserved_mb": 12288.0}
    first = make_run(
        "first",
        lines=step_lines(**memory),
        machine=machine,
        plan={"predicted_peak_gib": 10.0},
    )
    config = {"SOLVER": {"IMS_PER_BATCH": 16, "MAX_ITER": 10, "BASE_LR": 0.00015625}}
    second = make_run("second", lines=step_lines(10, batch=16), config=config)
    return [read_run(folder, folder.name) for folder in (first, second)]


def test_settings_side_by_side(runs):
    (table,) = settings_section(runs, read_published()).tables
    first, second, published = (column(table, number) for number in (1, 2, 3))
    assert (first["total batch"], second["total batch"], published["total batch"]) == (
        "8",
        "16",
        "16",
    )
    assert (first["images per GPU"], published["images per GPU"]) == ("4", "8")
    assert (first["learning rate"], first["iterations"]) == ("0.01", "20")
    assert second["learning rate"] == "0.00015625"
    assert first["steps of the learning rate"] == "10, 15"
    assert (first["images seen"], published["images seen"]) == ("160", "480 000")
    assert first["weights at the start"] == "none"
    assert first["machine"] == "2 x Some GPU"
    assert "warm-up iterations" not in first
    assert any("32.662" in note for note in table.notes)


def test_time_and_memory(runs):
    section = throughput_section(runs, read_published())
    table = section.tables[0]
    first, second = column(table, 1), column(table, 2)
    assert first["total time"] == "0:00:10"
    assert second["time saved against the first"] == "50.0%"
    assert (first["images a second"], second["images a second"]) == ("16", "32")
    assert first["GPU memory allocated, fullest GPU"] == "8.00 GiB"
    assert first["GPU memory reserved, fullest GPU"] == "12.00 GiB"
    assert (first["GPU memory there is"], first["share reserved"]) == ("16.00 GiB", "75.0%")
    assert second["GPU memory allocated, fullest GPU"] == "–"  # noqa: RUF001
    published = [column(table, number) for number in (3, 4, 5)]
    assert [each["total time"] for each in published] == ["11:17:36", "20:15:22", "9:49:10"]
    assert [each["time saved against the first"] for each in published] == [
        "–",  # noqa: RUF001
        "none, 79.4% more",
        "13.1%",
    ]


def test_a_shorter_run_has_saved_nothing(runs, make_run):
    short = read_run(make_run("short", lines=step_lines(10)), "short")
    table = throughput_section([*runs, short], ()).tables[0]
    assert "fewer images" in column(table, 3)["time saved against the first"]


def test_plan_against_what_was_measured(runs):
    table = throughput_section(runs, ()).tables[1]
    first, second = column(table, 1), column(table, 2)
    assert (first["images a step, planned"], first["images a step, measured"]) == ("8", "8")
    assert (second["iterations, planned"], second["iterations, done"]) == ("10", "10")
    assert (first["images, planned"], first["images, seen"]) == ("160", "160")
    assert first["peak memory, predicted"] == "10.00 GiB"
    assert first["peak memory, allocated"] == "8.00 GiB"
    assert first["peak memory, predicted to allocated"] == "+25.0%"
    assert second["peak memory, predicted"] == "not predicted"


@pytest.fixture
def gain_run(make_run):
    folder = make_run("gain", lines=gain_lines(), config=GAIN_CONFIG, plan=GAIN_PLAN)
    return read_run(folder, "gain")


def test_the_gain_rule_side_by_side(runs, gain_run):
    time, plan = throughput_section([*runs, gain_run], ()).tables
    first, gain = column(plan, 1), column(plan, 3)
    assert (gain["images a step, measured"], gain["iterations, done"]) == ("16", "20")
    assert first["optimizer steps, planned"] == first["optimizer steps, taken"] == "20"
    assert gain["optimizer steps, planned"] == "10 to 20"
    assert gain["optimizer steps, taken"] == "16"
    assert (gain["images, planned"], gain["images, seen"]) == ("160 to 320", "256")
    efficiency = "efficiency against the recipe's batch"
    assert (gain[efficiency], first[efficiency]) == ("62%", "–")  # noqa: RUF001
    assert any(note.startswith("Efficiency") for note in plan.notes)
    assert column(time, 3)["seconds a step"] == "0.5"
    settings = settings_section([*runs, gain_run], ()).tables[0]
    assert column(settings, 3)["learning-rate rule"] == "gain"
    assert settings.notes[-1].endswith("times its gain: gain.")


def test_length_is_what_the_steps_were_worth(runs, make_run, gain_run):
    # 256 images, worth 160: as long as the runs that showed 160.
    assert time_saved(runs[0], gain_run) == pytest.approx(1 - 10 / 8)
    # A batch of half the recipe's shows fewer images, and has trained as far.
    config = {**GAIN_CONFIG, "SOLVER": {"IMS_PER_BATCH": 4, "MAX_ITER": 20}}
    small = gain_lines(32, gain=0.625, batch=4)
    run = read_run(make_run("small", lines=small, config=config, plan=GAIN_PLAN), "small")
    assert run.images_seen == 128
    assert time_saved(run, runs[0]) == pytest.approx(1 - 16 / 10)
    half = read_run(make_run("half", lines=gain_lines(8), config=GAIN_CONFIG), "half")
    assert time_saved(half, runs[0]) is None


def test_the_summary_names_steps_and_worth_of_the_gain_rule(runs, make_run):
    results = {"AP": 1.0}
    folder = make_run("gain", gain_lines(), results, config=GAIN_CONFIG, plan=GAIN_PLAN)
    (line,) = summary_lines(evaluate_runs([read_run(folder, "gain")], []))
    assert "by the gain rule 16 steps of 16 images, each image worth 0.62 of one" in line


def test_runs_without_a_gpu_have_no_memory_and_say_so(runs):
    table = throughput_section(runs[1:], ()).tables[0]
    assert not [name for name in column(table, 1) if "memory" in name]
    assert any("GPU" in note for note in table.notes)


def test_memory_that_is_the_first_gpus_is_marked_as_such(runs, make_run):
    folder = make_run("d2go", config={"D2GO_DATA": {"X": 1}})
    (folder / "log.txt").write_text("iter: 19  total_loss: 2  max_mem: 7168M\n")
    table = throughput_section([*runs, read_run(folder, "d2go")], ()).tables[0]
    assert column(table, 3)["GPU memory allocated, fullest GPU"] == "7.00 GiB"
    assert any(note.endswith("which alone is logged: d2go.") for note in table.notes)


def test_results_with_noise_and_differences(make_run, shapes):
    folders = [
        make_run(name, found=detections(shapes, shift=shift))
        for name, shift in (("good", 1.0), ("bad", 9.0))
    ]
    judged = evaluate_runs([read_run(folder, folder.name) for folder in folders], [])
    section = results_section(judged, read_published())
    results, differences, classes = section.tables
    assert results.head[1:4] == ("AP", "AP50", "AP75")
    assert results.rows[0][1].detail.startswith("±")
    assert [row[0].text for row in results.rows[2:]] == [
        "published 1 baseline",
        "published 2 same batch",
        "published 3 large batch",
    ]
    assert results.rows[4][1].text == "32.662"
    ((title, ap, *_),) = differences.rows
    assert title.text == "bad minus good"
    assert ap.text.startswith("-")
    assert ap.strong
    assert " to " in ap.detail
    assert len(classes.rows) == 60
    assert classes.head[1:3] == ("good", "bad")
    (text,) = section.paragraphs
    assert "Not comparable with the published runs: good, bad" in text
    assert "12 images" in text


def test_runs_of_different_tests_are_not_differenced(make_run):
    other = {"DATASETS": {"TEST": ["coco_2017_val"]}}
    folders = [
        make_run("one", results={"AP": 1.0, "AP-dog": 1.0}),
        make_run("other", results={"AP": 2.0, "AP-dog": 1.0}, config=other),
    ]
    section = results_section(evaluate_runs([read_run(f, f.name) for f in folders], []), ())
    assert [table.title for table in section.tables] == [
        "Results in the published columns",
        "AP of each class",
    ]
    assert "not tested on the same" in section.paragraphs[0]
    assert "one (coco_pretrain_val_base" in section.paragraphs[0]


def test_values_as_text():
    assert show_metric(32.6619) == "32.662"
    assert show_metric(float("nan")) == show_metric(None) == "–"  # noqa: RUF001
    assert show_duration(11 * 3600 + 17 * 60 + 35.6) == "11:17:36"
    assert show_duration(float("inf")) == "–"  # noqa: RUF001
    assert [show_number(value) for value in (0.00015625, 16.0, 123456.7, True, (), "x")] == [
        "0.0001563",
        "16",
        "123457",
        "yes",
        "–",  # noqa: RUF001
        "x",
    ]
