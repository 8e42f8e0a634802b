"""The size and the manners of the source, beside the import contracts in pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for root in ("d2scale", "projects/MetaFCOS/meta_fcos", "benchmarks")
    for path in (REPOSITORY / root).rglob("*.py")
)
MOST_LINES_OF_A_FILE = 300
MOST_LINES_OF_A_FUNCTION = 40


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_and_functions_can_be_read_at_once(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES_OF_A_FILE
    functions = (
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    )
    long = [
        (function.name, function.end_lineno - function.lineno + 1)
        for function in functions
        if function.end_lineno - function.lineno >= MOST_LINES_OF_A_FUNCTION
    ]
    assert not long


@pytest.mark.parametrize(
    "module",
    [
        "d2scale",
        "d2scale.cli",
        "d2scale.planning.plan",
        "d2scale.planning.progress",
        "d2scale.coco.metric",
        "d2scale.coco.shapes",
        "d2scale.run_folder.contents",
    ],
)
def test_planning_coco_and_run_folders_load_no_torch(module):
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
