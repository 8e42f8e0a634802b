"""What several test files share."""

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "projects" / "MetaFCOS" / "configs"


@pytest.fixture
def recipes() -> Path:
    """The folder of the MetaFCOS recipes."""
    return RECIPES


@pytest.fixture
def write_config(tmp_path):
    """Write a config file and return its path as text."""

    def write(text: str, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write
