"""How many recipes of detectron2 and d2go plan: ``python benchmarks/recipes.py DIR...``.

Every YAML file below the folders, and every LazyConfig if detectron2 is installed, is planned for
one GPU. The rest is listed, with the reasons. A LazyConfig is code, and is run.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from d2scale.config import load_recipe
from d2scale.detectron2.lazy_config import load_lazy_config, read_lazy_recipe
from d2scale.errors import D2ScaleError
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import Plan, make_plan

# Copies that a build leaves, what a checkout has besides recipes, and the parts of LazyConfigs.
_PASSED_OVER = {"build", "tests", "common", "__pycache__"}


def recipe_files(folder: str) -> Iterator[str]:
    """Yield the recipes below a folder, sorted; links are not followed.

    A ``.py`` file is one if it stands below a folder ``configs``.
    """
    for root, folders, files in os.walk(folder):
        folders[:] = sorted({name for name in folders if name[0] != "."} - _PASSED_OVER)
        kinds = (".yaml", ".py") if "configs" in Path(root).resolve().parts else ".yaml"
        yield from (os.path.join(root, name) for name in sorted(files) if name.endswith(kinds))


def plan_recipe(path: str) -> Plan:
    """Return the plan of one recipe for one GPU."""
    lazy = path.endswith(".py")
    cfg, _ = read_lazy_recipe(load_lazy_config(path)) if lazy else load_recipe(path)
    return make_plan(cfg, Hardware(1))


def main() -> None:
    paths = [path for folder in sys.argv[1:] for path in recipe_files(folder)]
    if importlib.util.find_spec("detectron2") is None:
        print("detectron2 is not installed: its LazyConfigs are left out")
        paths = [path for path in paths if path.endswith(".yaml")]
    refused: dict[str, str] = {}
    for path in paths:
        try:
            plan_recipe(path)
        except D2ScaleError as error:
            refused[path] = str(error)
    for kind, count in Counter(Path(path).suffix for path in paths).items():
        planned = count - sum(path.endswith(kind) for path in refused)
        print(f"{planned} of {count} {kind} recipes plan")
    for path, reason in refused.items():
        print(f"{path}: {reason}")


if __name__ == "__main__":
    main()
