"""d2go's own commands, run as a user does, and small recipes for them."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
COMMANDS = Path(sys.executable).parent
# d2scale train with d2go's arguments, beside the names of d2go's commands.
D2SCALE_TRAIN = "d2scale train --engine d2go"
# Whether torch has removed what d2go imports; looked up before d2scale puts it back.
LACKS_QUANTIZATION = (
    importlib.util.find_spec("torch") is not None
    and importlib.util.find_spec("torch.ao.quantization.quantize_pt2e") is None
)

META_FCOS = """
_BASE_: [d2scale://MetaFCOS/Base-MetaFCOS.yaml, d2scale://keep_total.yaml]
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  BACKBONE: {FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: GN}
  FPN: {OUT_CHANNELS: 64}
  FCOS: {NUM_CLS_CONVS: 1, NUM_BOX_CONVS: 1}
"""
RETINANET = """
_BASE_: [d2scale://keep_total.yaml]
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: RetinaNet
  WEIGHTS: ""
  BACKBONE: {NAME: build_retinanet_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: BN, OUT_FEATURES: [res3, res4, res5]}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  FPN: {IN_FEATURES: [res3, res4, res5], OUT_CHANNELS: 64}
  RETINANET: {NUM_CONVS: 1}
DATASETS: {TRAIN: [coco_2017_train], TEST: [coco_2017_val]}
"""


def command(name: str, recipe: Path, out: Path, *arguments: str, runner: str) -> list[str]:
    """Return the words of a command: a script, a module of d2go.tools, or ``D2SCALE_TRAIN``."""
    script = COMMANDS / name
    program = [str(script)] if script.exists() else [sys.executable, "-m", name]
    if name == D2SCALE_TRAIN:
        program = [sys.executable, "-m", "d2scale.cli", *name.split()[1:]]
    return [
        *program,
        *("--runner", runner, "--config-file", str(recipe), "--output-dir", str(out)),
        # Without it d2go asks for a debugger, and exits with 0 after a failure.
        *("--disable-post-mortem", *arguments),
    ]


def environment(datasets: Path, **variables: object) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(SUPPORT), os.environ.get("PYTHONPATH", "")]))
    own = {"DETECTRON2_DATASETS": datasets, "OMP_NUM_THREADS": 1, "PYTHONPATH": path, **variables}
    if LACKS_QUANTIZATION:
        own.setdefault("DETECTRON2_ENV_MODULE", "d2scale.d2go.environment")
    return {**os.environ, **{key: str(value) for key, value in own.items()}}


class D2Go:
    """Runs commands on a dataset; returns what they print and checks their exit status."""

    def __init__(self, folder: Path, datasets: Path) -> None:
        self.folder = folder
        self._datasets = datasets

    def recipe(self, config: str, name: str = "recipe.yaml") -> Path:
        path = self.folder / name
        path.write_text(config)
        return path

    def on_machines(
        self, config: str, arguments: Sequence[Sequence[str]], status: int = 0
    ) -> list[str]:
        """Train in one process on each of several machines, which are all this one."""
        recipe = self.recipe(config)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        paths = [self.folder / f"machine{rank}.txt" for rank in range(len(arguments))]
        machines = []
        for rank, (own, path) in enumerate(zip(arguments, paths, strict=True)):
            words = command(
                *("d2go.train_net", recipe, self.folder / f"machine{rank}"),
                *("--num-machines", str(len(arguments)), "--machine-rank", str(rank)),
                *("--dist-url", url, *own),
                runner="d2scale.Runner",
            )
            with path.open("w") as file:
                process = subprocess.Popen(
                    words,
                    env=environment(self._datasets),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            machines.append(process)
        for machine in machines:
            machine.wait()
        outputs = [path.read_text() for path in paths]
        for machine, output in zip(machines, outputs, strict=True):
            assert machine.returncode == status, f"status {machine.returncode}\n{output[-6000:]}"
        return outputs

    def __call__(
        self,
        config: str,
        *arguments: str,
        name: str = "d2go.train_net",
        out: str = "out",
        processes: int = 1,
        runner: str = "d2scale.Runner",
        status: int = 0,
        **variables: object,
    ) -> str:
        number = () if name == "d2go.exporter" else ("--num-processes", str(processes))
        words = command(
            *(name, self.recipe(config), self.folder / out, *number, *arguments), runner=runner
        )
        done = subprocess.run(
            words,
            env=environment(self._datasets, **variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        output = done.stdout + done.stderr
        assert done.returncode == status, f"status {done.returncode}\n{output[-6000:]}"
        return output


def errors(output: str) -> list[str]:
    """Return the lines that tell a user of a mistake."""
    return [line for line in output.splitlines() if line.startswith("d2scale: error")]
