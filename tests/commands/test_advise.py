from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from d2scale.cli import main
from d2scale.planning.advice import Candidate
from d2scale.planning.gain import NoisePoint
from d2scale.run_folder.measurements import Measurements, recipe_to_compare
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
    assert "note: the noise is that of double" in lines
    assert "note: not measured: AMP, activation checkpointing" in lines


def test_json_goes_to_a_file(runs, tmp_path, capsys):
    assert main(["advise", *runs, "--format", "json", "-o", "advice.json"]) == 0
    assert capsys.readouterr().out == ""
    content = json.loads((tmp_path / "advice.json").read_text())
    assert content["best"]["ims_per_batch"] == 16
    assert content["machine"] == "a processor, 2 cores"
    assert content["noise_from"] == "double"  # the larger batch
    assert content["recipe"]["SOLVER.MAX_ITER"] == 100
    assert content["noise"] == [[float(step), 8.0] for step in range(20, 201, 20)]


def test_runs_without_noise_still_give_their_speed(runs, tmp_path, capsys):
    write_run(tmp_path / "four", 32, 1.0, noise_scale="none")
    assert main(["advise", "four", *runs, "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [row["images_per_second"] for row in content["rows"]] == [10, 16, 32]
    assert content["noise_from"] == "double"


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


def test_a_finished_run_by_the_gain_rule_counts_by_its_own_noise(tmp_path, capsys):
    write_run(tmp_path / "double", 16, 1.6, noise_scale=None)  # infinite
    write_run(tmp_path / "four", 32, 3.2)
    write_run(tmp_path / "stopped", 64, 3.2, noise_scale=None, steps=10)
    write_run(tmp_path / "linear", 24, 1.2, noise_scale=None, rule="linear")
    runs = [str(tmp_path / name) for name in ("double", "four", "stopped", "linear")]
    assert main(["advise", *runs, "--format", "json"]) == 0
    rows = {row["ims_per_batch"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows[16]["steps"] == 50
    # By the noise of the largest batch: gains of 1.5, 8 / 5 and 16 / 9.
    assert [rows[images]["steps"] for images in (24, 32, 64)] == [67, 63, 57]


def test_d2go_times_the_recipes_iterations(tmp_path, capsys):
    run = write_run(tmp_path / "run", 16, 1.0, noise_scale=8.0, gain=1.25, steps=80)
    lines = [json.loads(line) for line in (run / "metrics.json").read_text().splitlines()]
    for line in lines:
        del line["elapsed_seconds"]
    lines[0]["noise_scale"] = float("inf")
    write_metrics(run, lines)
    (run / "machine.json").unlink()
    other = write_run(tmp_path / "other", 8, 1.0)
    assert main(["advise", str(other), str(run), "--format", "json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["rows"][1]["images_per_second"] == 16 / 1.25
    assert content["noise"][0][1] is None
    assert f"the machine of {run} is not known" in content["notes"]


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

    def test_odd_facts_of_a_machine_are_another_machine(self, runs, tmp_path, capsys):
        odd = '{"device": ["x"], "device_memory_mb": "much"}'
        (tmp_path / "double/machine.json").write_text(odd)
        assert "machine is \"['x']\"" in error_of(capsys, *runs)

    def test_an_output_that_cannot_be_written(self, runs, capsys):
        assert "--output" in error_of(capsys, *runs, "-o", "no/advice.json")


class TestConfig:
    """What it measures by itself is tested in tests/benchmark/test_first_steps.py."""

    @pytest.fixture
    def config(self, runs, tmp_path, monkeypatch):
        """The recipe of the runs; measuring it here takes no time."""
        self.asked = []

        def measure(cfg, options):
            self.asked.append((cfg, options))
            noise = recipe_to_compare(cfg, "the config")
            if options.measures_noise:
                noise = replace(noise, points=(NoisePoint(100, 8.0),))
            here = Candidate(32, 1, 32, "float32", 40.0, "measured here")
            return Measurements(noise, (here,), MACHINE, True, ("a note of measuring",))

        monkeypatch.setattr("d2scale.benchmark.first_steps.measure_first_steps", measure)
        return "recipe.yaml"

    def test_a_config_alone_measures_everything_here(self, config, capsys):
        options = ["--steps", "20", "--minutes", "3", "--max-ims-per-gpu", "5", "--variants"]
        assert main(["advise", config, *options, "MODEL.DEVICE", "cpu"]) == 0
        ((cfg, asked),) = self.asked
        assert (asked.steps, asked.minutes, asked.max_ims_per_gpu) == (20, 3.0, 5)
        assert asked.variants
        assert asked.measures_noise
        assert cfg.MODEL.DEVICE == "cpu"
        printed = capsys.readouterr()
        assert "note: a note of measuring" in printed.out
        assert printed.err == "measuring here (--minutes 3 at most)\n"

    def test_pairs_may_follow_the_config_at_once(self, config, capsys):
        assert main(["advise", config, "SEED", "3", "MODEL.DEVICE", "cpu"]) == 0
        assert (self.asked[0][0].SEED, self.asked[0][0].MODEL.DEVICE) == (3, "cpu")

    def test_runs_give_the_noise_and_their_speeds(self, config, runs, capsys):
        assert main(["advise", *runs, config, "--format", "json"]) == 0
        assert not self.asked[0][1].measures_noise
        content = json.loads(capsys.readouterr().out)
        assert [row["images_per_second"] for row in content["rows"]] == [10, 16, 40]

    def test_runs_of_another_machine_give_their_noise_alone(self, config, runs, tmp_path, capsys):
        (tmp_path / "double/machine.json").write_text('{"device": "NVIDIA A100"}')
        assert main(["advise", *runs, config]) == 0
        out = capsys.readouterr().out
        assert "| 16 " not in out
        assert "the speed of double is left out: it ran on NVIDIA A100, not a processor" in out

    def test_mistakes_are_found_before_minutes_are_spent(self, config, runs, capsys):
        line = error_of(capsys, *runs, config, "SOLVER.BASE_LR", "0.5")
        assert "SOLVER.BASE_LR is 0.001; allowed: 0.5, as in recipe.yaml" in line
        assert "--output" in error_of(capsys, config, "-o", "no/advice.json")
        assert "CONFIG is" in error_of(capsys, config, config)
        assert "KEY VALUE is" in error_of(capsys, *runs, "SEED", "3")
        assert "SEED" in error_of(capsys, config, "SEED")
        assert "nowhere.yaml" in error_of(capsys, "nowhere.yaml")
        assert self.asked == []


class TestPlanWithNoise:
    @pytest.fixture
    def plan(self, runs):
        return ["recipe.yaml", "--method", "max_memory", "--ims-per-gpu", "16"]

    def test_the_steps_to_expect_are_in_the_table_and_in_json(self, plan, capsys):
        assert main(["plan", *plan, "--noise", "recipe"]) == 0
        assert "50 to 100, about 75 expected" in capsys.readouterr().out
        assert main(["plan", *plan, "--noise", "double", "--format", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["expected_steps"] == 75

    def test_what_advise_wrote_says_the_same(self, plan, runs, capsys):
        assert main(["advise", *runs, "--format", "json", "-o", "advice.json"]) == 0
        assert main(["plan", *plan, "--noise", "advice.json"]) == 0
        assert "about 75 expected" in capsys.readouterr().out

    def test_another_rule_has_its_steps_without(self, plan, capsys):
        assert main(["plan", *plan, "--noise", "recipe", "--lr-rule", "linear"]) == 0
        printed = capsys.readouterr()
        assert "expected" not in printed.out
        assert printed.err == "note: --noise tells nothing of the rule linear\n"

    def test_it_needs_no_torch(self, plan):
        code = (
            "import sys; from d2scale.cli import main; status = main(sys.argv[1:]);"
            "sys.exit('torch' in sys.modules or status)"
        )
        command = [sys.executable, "-c", code, "plan", *plan, "--noise", "recipe"]
        subprocess.run(command, check=True, capture_output=True)

    def test_mistakes_are_one_line(self, plan, tmp_path, capsys):
        def error(*arguments):
            return error_of(capsys, *plan, *arguments, command="plan")

        assert "--noise is 'nowhere'" in error("--noise", "nowhere")
        assert "--noise is 'recipe'" in error("--noise", "recipe", "--explore")
        line = error("--noise", "recipe", "SOLVER.MAX_ITER", "200")
        assert "SOLVER.MAX_ITER is 200; allowed: 100, as in recipe" in line
        write_run(tmp_path / "silent", noise_scale="none")
        assert "--noise is 'silent'" in error("--noise", "silent")

    @pytest.mark.parametrize(
        "content",
        [
            "{",
            "{}",
            '{"noise": 3, "recipe": {}}',
            '{"noise": [[1, "x"]], "recipe": {"SOLVER.MAX_ITER": 1, "SOLVER.IMS_PER_BATCH": 1}}',
            '{"noise": [[1, 1]], "recipe": {"SOLVER.MAX_ITER": 0, "SOLVER.IMS_PER_BATCH": 1}}',
            '{"noise": [[1, 1]], "recipe": []}',
        ],
    )
    def test_a_broken_file_is_one_line(self, plan, tmp_path, capsys, content):
        (tmp_path / "advice.json").write_text(content)
        assert "advice.json" in error_of(capsys, *plan, "--noise", "advice.json", command="plan")
