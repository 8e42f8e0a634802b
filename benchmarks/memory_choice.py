"""Does d2scale choose the largest batch that trains? On a simulated device, for many budgets.

    python benchmarks/memory_choice.py

For every budget the largest batch that really trains is found by trying all near the choice, and
three beyond one that fails; an epoch is trained at the choice. See ``simulated.py`` for the device.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from machine import keep, table_of
from simulated import COCO_LIKE, Bench, d2scale_probe

# Settings, how many times as long the sides of the images are, and about how many images the
# budgets shall hold. With few small images the optimizer's step is the peak, whatever their number.
CHOICES: dict[str, tuple[tuple[str, ...], int, tuple[int, ...]]] = {
    "float32, larger images": ((), 2, (3, 5, 8)),
    "float32": ((), 1, (12, 17, 24, 33, 45, 60)),
    "AMP bfloat16": (
        ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"),
        1,
        (20, 40),
    ),
    "checkpointing": (("D2SCALE.ACTIVATION_CHECKPOINTING", "True"), 1, (40,)),
}


def rows(bench: Bench, choice: str, images: int) -> list[dict[str, Any]]:
    """Return the row of one setting and budget."""
    budget_bytes = bench.budget_for(images)
    chosen, trials = d2scale_probe(bench, budget_bytes)
    most = bench.most(budget_bytes, near=chosen)
    return [
        {
            "key": f"{choice}, {images}",
            "choice": choice,
            "budget MB": round(budget_bytes / 1e6, 1),
            "most that trains": most,
            "chosen": chosen,
            "of the most %": round(100 * chosen / most, 1),
            "sizes tried": trials,
            "steps out of memory in an epoch": bench.failures(chosen, budget_bytes),
        }
    ]


def main() -> None:
    """Try all, keep the rows, print them."""
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore")
    kept: list[dict[str, Any]] = []
    for choice, (opts, scale, held) in CHOICES.items():
        bench = Bench(COCO_LIKE, opts, scale)
        for images in held:
            kept = keep("memory_choice", rows(bench, choice, images), "key")
    print(table_of(kept))


if __name__ == "__main__":
    main()
