import json
import signal
import subprocess
import sys
import time

import pytest

from d2scale.cli import main


def test_plan_prints_a_table(recipes, capsys):
    path = str(recipes / "Meta-FCOS-pretrain.yaml")
    assert main(["plan", path, "--gpus", "1", "--method", "per_gpu"]) == 0
    assert "| SOLVER.MAX_ITER                                 | 90000        | 5760000" in (
        capsys.readouterr().out
    )


def test_plan_writes_json_to_a_file(recipes, tmp_path, capsys):
    target = tmp_path / "plan.json"
    arguments = ["plan", str(recipes / "experiment-1-baseline.yaml"), "--format", "json"]
    assert main([*arguments, "-o", str(target), "SOLVER.BASE_LR", "0.02"]) == 0
    assert json.loads(target.read_text())["method"] == "keep_total"
    assert capsys.readouterr().out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_mistakes_are_told_one_to_a_line_with_status_2(recipes, tmp_path, capsys):
    target = tmp_path / "plan.json"
    path = str(recipes / "experiment-1-baseline.yaml")
    faulty = ["SOLVER.BASE_LR", "-1", "SOLVER.STEPS", "(3,2)"]
    assert main(["plan", path, "-o", str(target), *faulty]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 2
    assert all(line.startswith("d2scale: error: ") for line in printed.err.splitlines())
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_a_mistake(recipes, tmp_path, capsys):
    path = str(recipes / "experiment-1-baseline.yaml")
    assert main(["plan", path, "-o", str(tmp_path / "no" / "plan.yaml")]) == 2
    assert "--output" in capsys.readouterr().err


def test_an_output_file_is_readable_as_others_are_and_a_link_stays(recipes, tmp_path):
    arguments = ["plan", str(recipes / "experiment-1-baseline.yaml"), "-o"]
    (tmp_path / "link").symlink_to("target")
    assert main([*arguments, str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "plain").touch()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_config_for_other_engines_cannot_follow_the_gain_rule(recipes, capsys):
    larger = ["plan", str(recipes / "experiment-1-baseline.yaml"), "--method", "max_memory"]
    larger += ["--ims-per-gpu", "32", "--format"]
    assert main([*larger, "json"]) == 0
    assert json.loads(capsys.readouterr().out)["lr_rule"] == "gain"
    assert main([*larger, "yaml"]) == 0
    written = capsys.readouterr().out
    assert "scaled linearly, which may cost quality" in written
    assert "BASE_LR: 0.02" in written
    assert main([*larger, "yaml", "--lr-rule", "gain"]) == 2
    assert "take linear, or train with d2scale train" in capsys.readouterr().err


def test_dev_stdout_can_be_the_output(recipes):
    path = str(recipes / "experiment-1-baseline.yaml")
    command = [sys.executable, "-m", "d2scale", "plan", path]
    printed = subprocess.check_output([*command, "-o", "/dev/stdout"])
    assert printed == subprocess.check_output(command)


def test_a_missing_config_is_a_mistake(capsys):
    assert main(["plan", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err


def test_options_that_do_not_exist_end_with_status_2():
    with pytest.raises(SystemExit) as raised:
        main(["plan", "--nonsense"])
    assert raised.value.code == 2


def test_planning_needs_no_engine_and_answers_within_a_second(recipes):
    code = (
        "import sys; from d2scale.cli import main; status = main(sys.argv[1:]);"
        "loaded = {'torch', 'detectron2', 'd2go'} & set(sys.modules);"
        "sys.exit(str(loaded) if loaded else status)"
    )
    arguments = ["plan", str(recipes / "Meta-FCOS-pretrain.yaml"), "--method", "per_gpu"]
    seconds = []
    for _ in range(3):  # the fastest of three: the machine may be busy
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 1


@pytest.mark.parametrize(
    "words", [["plan", ""], ["plan", "x.yaml", "--lr-rule", ""], ["report", "run", ""]]
)
def test_an_empty_word_is_refused(words, capsys):
    assert main(words) == 2
    assert "is ''; allowed: no empty word" in capsys.readouterr().err


SWALLOWS = """\
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except BaseException:
    pass
"""
COMMAND = """\
import sys
from d2scale import cli
def run(arguments):
    import swallows
    print("went on")
class Command:
    def add_parser(commands):
        commands.add_parser("run").set_defaults(command=run, takes_opts=False)
cli.all_commands = lambda: [Command]
sys.exit(cli.main(["run"]))
"""


def test_ctrl_c_is_not_lost_in_an_import_that_catches_everything(tmp_path):
    (tmp_path / "swallows.py").write_text(SWALLOWS)
    done = subprocess.run(
        [sys.executable, "-c", COMMAND], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "d2scale: interrupted\n")


def test_a_path_that_the_system_refuses_is_told_in_one_line(capsys):
    assert main(["report", "x" * 5000]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "File name too long" in line
    assert len(line) < 1000


def test_words_that_argparse_refuses_cannot_command_a_terminal(capsys):
    with pytest.raises(SystemExit):
        main(["report", "run", "--no\x1b[31m"])
    assert r"--no\x1b[31m" in capsys.readouterr().err


INTERRUPTED = """\
import os, signal, sys, time
class Interrupt:
    def find_spec(name, *others):
        if name == "d2scale.cli":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
sys.meta_path.insert(0, Interrupt)
from d2scale.__main__ import main
main()
"""


def test_ctrl_c_while_the_command_line_is_imported_ends_it_without_a_word():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")
