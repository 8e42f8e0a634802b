"""All slices of the campaign, in the order in which they run: the cheapest doubts first."""

from __future__ import annotations

from functools import partial

from campaign import checks, experiments, memory, speed
from campaign.setting import Slice

_BUDGETS_GIB = (8.0, 16.0, 24.0, 40.0, 72.0)
# torch reads the first up to 2.8 and the second from then on; both accept the first.
_EXPANDABLE = (("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),)
_ON_HOST = ("tests/step", "tests/memory", "tests/engine/test_run.py", "projects/MetaFCOS/tests")
_VISIBLE = ("tests/engine/data", "tests/step/test_guard.py", "tests/memory")
_MARKED = (
    ("parity", 2.0, ("projects/MetaFCOS/tests/test_parity.py",)),
    ("gradients", 2.0, ("tests/gpu/test_gradients.py",)),
    ("scaler", 1.0, ("tests/gpu/test_scaler.py",)),
    ("exactness", 2.0, ("tests/gpu/test_exactness.py",)),
    ("guard", 2.0, ("tests/gpu/test_guard.py", "tests/gpu/test_memory.py")),
    ("resume", 3.0, ("tests/gpu/test_resume.py",)),
    ("processes", 3.0, ("tests/gpu/test_processes.py",)),
    ("loader-tests", 1.0, ("tests/engine/data/test_loader.py",)),
)
_VARIANTS = (
    ("float32", ("float32", "float32, checkpointing")),
    ("amp", ("AMP", "AMP, checkpointing")),
)

SLICES: tuple[Slice, ...] = (
    Slice("doctor", 0.5, checks.doctor),
    *(
        Slice(f"tests-{name}", minutes, partial(checks.run_tests, paths=paths))
        for name, minutes, paths in _MARKED
    ),
    Slice("tests-host", 8.0, partial(checks.run_tests, paths=_ON_HOST, marked=False, hidden=True)),
    Slice("tests-visible", 5.0, partial(checks.run_tests, paths=_VISIBLE, marked=False)),
    Slice("benchmark-float32", 2.0, partial(speed.command, amp=False)),
    Slice("benchmark-amp", 2.0, partial(speed.command, amp=True)),
    *(
        Slice(f"memory-r{depth}-{name}", 4.0, partial(memory.predicted, depth=depth, names=names))
        for depth in (50, 18)
        for name, names in _VARIANTS
    ),
    Slice("step-float32", 2.0, partial(speed.against_torchvision, precision="float32")),
    Slice("step-float16", 2.0, partial(speed.against_torchvision, precision="float16")),
    Slice("compile-float32", 4.0, partial(speed.compiled, precision="float32")),
    Slice("compile-float16", 4.0, partial(speed.compiled, precision="float16")),
    Slice("inference", 1.0, speed.inference),
    Slice("loader", 4.0, speed.loader),
    *(
        Slice(f"epoch-{budget:g}", 4.0, partial(memory.epoch, budget_gib=budget))
        for budget in _BUDGETS_GIB
    ),
    Slice("epoch-16-expandable", 4.0, partial(memory.epoch, budget_gib=16.0), _EXPANDABLE),
    Slice("budget", 4.0, memory.budget),
    Slice("profile-float32", 1.0, partial(speed.profile, amp=False)),
    Slice("profile-amp", 1.0, partial(speed.profile, amp=True)),
    Slice("neighbour", 2.0, memory.neighbour),
    *(
        Slice(f"choice-{budget:g}", 6.0, partial(memory.choice, budget_gib=budget))
        for budget in _BUDGETS_GIB
    ),
    *(
        Slice(f"experiment-{word}", 5.0, partial(experiments.experiment, word=word))
        for word in experiments.WORDS
    ),
    Slice("report", 1.0, experiments.report),
)
