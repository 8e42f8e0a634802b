from __future__ import annotations

import json

import pytest

from d2scale.cli import main
from measured_runs import MACHINE, metric_lines, write_metrics, write_run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Folders of the recipe's run and of one with twice the batch, as a user names them."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "recipe", 8, 0.8)
    write_run(tmp_path / "double", 16, 1.0)
    return ["recipe", "double"]


def error_of(capsys, *arguments, command="advise"):
    """Return the one line of a mistake."""
    assert main([command, *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("d2scale: error: ")
    return line


def test_runs_become_a_table_with_the_best_batch_and_why(runs, capsys):
    assert main(["advise", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4]]
    assert cells == [
        ["8", "1", "8", "float32", "10", "1.00", "800", "100", "0:01:20", ""],
        ["16", "1", "16", "float32", "16", "0.67", "1200", "75", "0:01:15", "best"],
    ]
    assert "best: 16 images a step (16 per GPU, GPUs: 1, float32)" in lines
    assert any(line.startswith("why: 16 images a step save 6 % against") for line in lines)
    assert "note: the noise is that of recipe" in lines
    assert "note: not measured: AMP, activation checkpointing" in lines


def test_json_goes_to_a_file(runs, tmp_path, capsys):
    assert main(["advise", *runs, "--format", "json", "-o", "advice.json"]) == 0
    assert capsys.readouterr().out == ""
    content = json.loads((tmp_path / "advice.json").read_text())
    assert content["best"]["ims_per_batch"] == 16
    assert content["machine"] == "a processor, 2 cores"
    assert content["noise_from"] == "recipe"
    assert content["recipe"]["SOLVER.MAX_ITER"] == 100
    assert content["noise"] == [[float(step), 8.0] for step in range(10, 101, 10)]


def test_runs_without_noise_still_give_their_speed(runs, tmp_path, capsys):
    write_run(tmp_path / "four", 32, 1.0, noise_scale="none")
    assert main(["advise", "four", *runs, "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["images_per_second"] for row in content["rows"]] == [10, 16, 32]
    assert content["noise_from"] == "recipe"


def test_noise_of_a_training_that_kept_its_quality_is_preferred(tmp_path, capsys):
    linear = write_run(tmp_path / "linear", 16, 1.0, rule="linear", noise_scale=1000.0, steps=50)
    gain = write_run(tmp_path / "gain", 16, 1.0)
    assert main(["advise", str(linear), str(gain), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["noise_from"] == str(gain)
    # Without the gain rule a step counts for its images.
    assert main(["advise", str(linear), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["noise"][0] == [20.0, 1000.0]


def test_the_gain_rule_counts_in_the_recipes_steps(tmp_path, capsys):
    run = write_run(tmp_path / "run", 16)
    lines = [
        {**line, "recipe_steps": 15.0 * number, "steps": 10 * number}
        for number, line in enumerate(metric_lines(16, 1.0, noise_scale=3.0), start=1)
    ]
    lines[0]["noise_scale"] = None  # infinite
    write_metrics(run, lines)
    assert main(["advise", str(run), "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["noise"][:2] == [[15.0, None], [30.0, 3.0]]


def test_steps_of_another_batch_before_a_resume_do_not_count_as_speed(tmp_path, capsys):
    run = write_run(tmp_path / "run", 16, 1.0)
    before = metric_lines(8, 5.0, steps=60)
    after = [
        {**line, "images_seen": 480 + line["images_seen"], "iteration": 30 + line["iteration"]}
        for line in metric_lines(16, 1.0, steps=20)
    ]
    write_metrics(run, before + after)
    assert main(["advise", str(run), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["images_per_second"] == 16


def test_a_line_that_a_kill_has_cut_and_evaluations_are_passed_over(runs, tmp_path, capsys):
    with (tmp_path / "recipe/metrics.json").open("a") as file:
        file.write(json.dumps({"iteration": 99, "bbox/AP": None}) + '\n{"iteration": 1')
    assert main(["advise", *runs]) == 0


class TestBadInput:
    def test_no_run_there(self, runs, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        assert "RUN is 'nowhere'" in error_of(capsys, *runs, "nowhere")
        assert "RUN is 'empty'" in error_of(capsys, "empty")

    def test_a_run_without_noise(self, tmp_path, capsys):
        run = write_run(tmp_path / "run", noise_scale="none")
        line = error_of(capsys, run)
        assert "has no noise_scale: train with --lr-rule gain, or with two parts" in line

    def test_another_recipe(self, runs, tmp_path, capsys):
        write_run(tmp_path / "other", opts=("SOLVER.BASE_LR", "0.5", "SOLVER.GAMMA", "0.3"))
        line = error_of(capsys, *runs, "other")
        assert "SOLVER.BASE_LR is 0.5; allowed: 0.001, as in recipe" in line
        assert line.endswith("other is of another")

    def test_another_seed_or_precision_is_the_same_recipe(self, runs, tmp_path, capsys):
        write_run(tmp_path / "amp", opts=("SEED", "5", "SOLVER.AMP.ENABLED", "True"))
        assert main(["advise", *runs, "amp"]) == 0
        assert "| AMP " in capsys.readouterr().out

    def test_another_machine(self, runs, tmp_path, capsys):
        machine = {**MACHINE, "device": "NVIDIA A100", "device_memory_mb": 40960}
        (tmp_path / "double/machine.json").write_text(json.dumps(machine))
        line = error_of(capsys, *runs)
        assert "machine is 'NVIDIA A100, 40 GiB'; allowed: runs of one machine" in line

    def test_an_optimizer_like_adam(self, tmp_path, capsys):
        run = write_run(tmp_path / "run", rule="sqrt", opts=("SOLVER.OPTIMIZER", "adamw"))
        line = error_of(capsys, run)
        assert "SOLVER.OPTIMIZER is 'adamw'" in line
        assert "proven for SGD alone" in line

    def test_no_step_was_timed(self, tmp_path, capsys):
        run = write_run(tmp_path / "run")
        write_metrics(run, metric_lines(7, 1.0))
        assert "RUN is" in error_of(capsys, run)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("metrics.json", '{"time"\n{}\n'),
            ("metrics.json", '{"time": 1, "iteration": 0, "noise_scale": "x"}\n{}\n'),
            ("metrics.json", '{"time": -1, "iteration": 0}\n{}\n'),
            ("metrics.json", "[1]\n3\n{}"),
            ("plan.json", "{"),
            ("plan.json", '{"ims_per_batch": 8}'),
            ("plan.json", '{"ims_per_batch": true}'),
            ("machine.json", "[]"),
            ("config.yaml", "SOLVER: ["),
            ("config.yaml", "SOLVER: {MAX_ITER: -3}"),
        ],
    )
    def test_a_broken_file(self, runs, tmp_path, capsys, name, content):
        (tmp_path / "double" / name).write_text(content)
        error_of(capsys, *runs)

    def test_bytes_instead_of_text(self, runs, tmp_path, capsys):
        (tmp_path / "double/metrics.json").write_bytes(b"\xff\xfe\xff")
        assert "metrics.json" in error_of(capsys, *runs)

    def test_an_output_that_cannot_be_written(self, runs, capsys):
        assert "--output" in error_of(capsys, *runs, "-o", "no/advice.json")
