"""What a run writes down when an out-of-memory error has made its micro-batches smaller."""

from __future__ import annotations

from pathlib import Path

from d2scale.engine.checkpoint.checkpointer import RunCheckpointer
from d2scale.planning.plan import Plan
from d2scale.run_folder.contents import write_plan
from d2scale.step.ranks import rank


class RecordSplit:
    """Writes a plan with fewer images per GPU into the run's folder and its checkpoints."""

    def __init__(self, plan: Plan, checkpointer: RunCheckpointer) -> None:
        self._plan = plan
        self._checkpointer = checkpointer

    def __call__(self, ims_per_gpu: int) -> None:
        self._plan = self._plan.with_smaller_micro_batches(ims_per_gpu)
        self._checkpointer.facts["plan"] = self._plan.to_json()
        if rank() == 0:
            write_plan(Path(self._checkpointer.save_dir), self._plan)
