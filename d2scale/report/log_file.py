"""Facts that only ``log.txt`` holds: the last results, times, ranks, scaled keys."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2scale.coco.accumulate import METRICS
from d2scale.run_folder.files import LOG_FILE

# No count in a log has more digits than these, and Python reads no more than 4300.
_TOTAL_TIME = re.compile(r"Total training time: (?:(\d{1,6}) days?, )?(\d{1,9}):(\d\d):(\d\d)")
_SPEED = re.compile(r"Overall training speed: .*\((\d{1,12}(?:\.\d{1,12})?) s / it\)")
_WORLD_SIZE = re.compile(r"World size: (\d{1,9})\b|processes: (\d{1,9}), device: ")
_MEMORY = re.compile(r"\bmax_mem: (\d{1,12})M\b")


@dataclass
class LogFacts:
    """What a log says; of what it says several times, the last."""

    results: dict[str, float] = field(default_factory=dict)  # percent, by published column
    class_results: dict[str, float] = field(default_factory=dict)  # AP of each class, percent
    total_seconds: float | None = None  # of training
    seconds_per_iteration: float | None = None
    world_size: int | None = None
    max_memory_mib: float | None = None  # largest ``max_mem`` of rank 0
    scaled: dict[str, Any] = field(default_factory=dict)  # as d2go scaled them, by dotted key


def read_log(folder: Path) -> LogFacts:
    """Read ``log.txt``; facts that it does not hold stay empty."""
    facts = LogFacts()
    try:
        lines = (folder / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return facts
    for line in lines:
        _read_line(line, facts)
    for table in _tables(lines):
        _read_table(table, facts)
    return facts


def _read_line(line: str, facts: LogFacts) -> None:
    if match := _TOTAL_TIME.search(line):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        facts.total_seconds = float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    elif match := _SPEED.search(line):
        facts.seconds_per_iteration = float(match[1])
    elif match := _WORLD_SIZE.search(line):
        facts.world_size = int(match[1] or match[2])
    elif match := _MEMORY.search(line):
        facts.max_memory_mib = max(float(match[1]), facts.max_memory_mib or 0.0)


def _tables(lines: Sequence[str]) -> Iterator[list[list[str]]]:
    """Yield the cells of each pipe table, without the line under its head."""
    table: list[list[str]] = []
    for line in [*lines, ""]:
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if not all(set(cell) <= set(":-") for cell in cells):
                table.append(cells)
        elif table:
            yield table
            table = []


def _read_table(table: list[list[str]], facts: LogFacts) -> None:
    head, *rows = table
    if head[:2] == list(METRICS[:2]) and len(rows) == 1:
        cells = zip(head, rows[0], strict=False)
        facts.results = _numbers((name, cell) for name, cell in cells if name in METRICS)
    elif head[:2] == ["category", "AP"]:
        pairs = (pair for row in rows for pair in zip(row[::2], row[1::2], strict=False))
        facts.class_results = _numbers((name, cell) for name, cell in pairs if name)
    elif head == ["config key", "old value", "new value"]:
        # d2go prints the same table again after training.
        keys = [row for row in rows if len(row) == 3 and "." in row[0]]
        facts.scaled |= {key: _literal(new) for key, _, new in keys}


def _numbers(cells: Iterable[tuple[str, str]]) -> dict[str, float]:
    """Return the cells that hold numbers, nan among them."""
    numbers = {}
    for name, cell in cells:
        with suppress(ValueError):
            numbers[name] = float(cell)
    return numbers


def _literal(cell: str) -> Any:
    try:
        return ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return cell
