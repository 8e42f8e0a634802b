"""How many recipes of detectron2 and d2go plan: ``python benchmarks/recipes.py DIR...``.

Every YAML file and LazyConfig under the folders is planned for one GPU. The rest is listed, with
the reasons. Say the folders of recipes: a checkout has other YAML files, too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from d2scale.config import load_recipe
from d2scale.errors import D2ScaleError
from d2scale.planning.hardware import Hardware
from d2scale.planning.plan import make_plan

# Copies that a build leaves, and what a checkout has besides recipes.
_PASSED_OVER = {"build", "tests", "node_modules", "__pycache__"}


def recipe_files(folder: str) -> Iterator[str]:
    """Yield the recipes below a folder, sorted; links are not followed."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted({name for name in folders if name[0] != "."} - _PASSED_OVER)
        yield from (os.path.join(root, name) for name in sorted(files) if name.endswith(".yaml"))


def main() -> None:
    paths = [path for folder in sys.argv[1:] for path in recipe_files(folder)]
    refused: dict[str, str] = {}
    for path in paths:
        try:
            make_plan(load_recipe(path)[0], Hardware(1))
        except D2ScaleError as error:
            refused[path] = str(error)
    print(f"{len(paths) - len(refused)} of {len(paths)} recipes plan")
    for path, reason in refused.items():
        print(f"{path}: {reason}")


if __name__ == "__main__":
    main()
