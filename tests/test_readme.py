"""What the README shows is what the commands print."""

import re
import shlex
from pathlib import Path

import pytest

from d2scale.cli import main

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ d2scale (plan .*)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_output_shown_is_the_output_printed(command, capsys):
    assert main(shlex.split(command)) == 0
    facts, table = capsys.readouterr().out.strip().split("\n\n", 1)
    assert f"```\n{facts}\n```" in README
    assert table in README


def test_there_is_something_to_check():
    assert COMMANDS
