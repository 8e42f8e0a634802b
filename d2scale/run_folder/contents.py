"""Writing (ConfigError if that fails) and reading the config, plan and facts of a run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2scale.errors import ConfigError, Fault
from d2scale.run_folder import files

if TYPE_CHECKING:
    from d2scale.planning.plan import Plan

_LONGEST_NAME = 255  # bytes, of a file system


def write_config(folder: Path, cfg: Any) -> None:
    """Write the config that a run uses to ``config.yaml``."""
    files.write_atomically(folder / files.CONFIG_FILE, cfg.dump())


def write_plan(folder: Path, plan: Plan) -> None:
    """Write ``plan.json``."""
    write_json(folder / files.PLAN_FILE, plan.to_json())


def write_machine(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write ``machine.json``: the devices, processor and versions of a run."""
    write_json(folder / files.MACHINE_FILE, facts)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented, to end in a line feed."""
    files.write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return a file's JSON object, empty if there is no file; ConfigError if it holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        pass
    allowed = "a file that holds a JSON object"
    raise ConfigError([Fault("file", str(path), allowed, "restore it, or remove it")])


def last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that ``last_checkpoint`` names, perhaps missing or broken, or None."""
    try:
        name = (folder / files.LAST_CHECKPOINT).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    # What lies elsewhere is no checkpoint of this run.
    is_name = name == Path(name).name not in ("", "..") and len(name.encode()) <= _LONGEST_NAME
    return folder / name if is_name and name.isprintable() else None


def holds_run(folder: Path) -> bool:
    """Return whether ``folder`` holds the checkpoints of a run."""
    return (folder / files.LAST_CHECKPOINT).exists() or any(folder.glob(files.CHECKPOINTS))
