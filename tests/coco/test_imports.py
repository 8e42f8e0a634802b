from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import d2scale.coco


def test_importing_any_module_loads_neither_torch_nor_an_engine():
    names = [
        f"d2scale.coco.{path.stem}" for path in Path(d2scale.coco.__file__).parent.glob("[!_]*.py")
    ]
    code = (
        f"import sys, {', '.join(names)};"
        "above = ('torch', 'd2scale.engine', 'd2scale.step', 'd2scale.report');"
        "sys.exit(', '.join(name for name in above if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
