"""What the README shows is what the commands print."""

import re
import shlex
from pathlib import Path

import pytest

from d2scale.cli import main

ROOT = Path(__file__).resolve().parents[1]
README, CHINESE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md")
)
COMMANDS = re.findall(r"^\$ d2scale (plan .*)$", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_output_shown_is_the_output_printed(command, capsys):
    assert main(shlex.split(command)) == 0
    facts, table = capsys.readouterr().out.strip().split("\n\n", 1)
    assert f"```\n{facts}\n```" in README
    assert table in README


def test_the_choices_shown_are_the_choices_printed(capsys):
    (command,) = re.findall(r"^d2scale (plan .* --explore)$", README, flags=re.MULTILINE)
    assert main(shlex.split(command)) == 0
    assert capsys.readouterr().out.strip() in README


def test_there_is_something_to_check():
    assert COMMANDS


def blocks_of(page):
    return re.findall(r"^```.*?^```$", page, flags=re.MULTILINE | re.DOTALL)


def figures_of(page):
    """Return the numbers in each row of each table."""
    rows = re.findall(r"^\|.*$", page, flags=re.MULTILINE)
    return [sorted(re.findall(r"\d(?:[\d.:e-]*\d)?", row)) for row in rows]


def links_of(page):
    links = re.findall(r"(?:\]\(|src(?:set)?=\")([^)\"]+)", page)
    return [link for link in links if not link.startswith(("#", "README"))]


@pytest.mark.parametrize("part", [blocks_of, figures_of, links_of])
def test_the_chinese_page_says_the_same(part):
    english, chinese = part(README), part(CHINESE)
    assert len(english) > 5
    assert english == chinese


def test_both_pages_lead_to_each_other_and_to_their_own_headings():
    assert "(README.zh-CN.md)" in README
    assert "(README.md)" in CHINESE
    for page in (README, CHINESE):
        headings = re.findall(r"^#+ (.*)$", page, flags=re.MULTILINE)
        anchors = {re.sub(r"[^\w\- ]", "", text).lower().replace(" ", "-") for text in headings}
        assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors
