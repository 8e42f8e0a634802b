"""What a trace of torch's profiler says about a device: busy, idle, waited for, copying."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

# A stretch of time: beginning and end, microseconds.
Span = tuple[float, float]

_KERNELS = ("kernel",)
_COPIES = ("gpu_memcpy", "gpu_memset")
# Calls of the runtime in which the host waits for the device.
_WAITS = ("Synchronize", "cudaMemcpy", "cudaFree", "cudaMalloc", "cudaHostAlloc")
_GAP_US = 20.0


def summary(events: Iterable[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Return, for each of the ``steps``, what the device and the host did, in milliseconds."""
    events = [event for event in events if event.get("ph") == "X"]
    kernels = _spans(events, _KERNELS)
    copies = _spans(events, _COPIES)
    whole = max((end for _, end in kernels), default=0.0) - min(
        (begin for begin, _ in kernels), default=0.0
    )
    busy = total(kernels)
    gaps = [later[0] - earlier[1] for earlier, later in pairwise(kernels)]
    waits = [event for event in events if _is_wait(event)]
    copied = total(copies)
    return {
        "ms a step": _each(whole, steps),
        "ms in kernels": _each(busy, steps),
        "device busy %": round(100 * busy / whole, 1) if whole else None,
        "gaps above 20 us": round(sum(gap > _GAP_US for gap in gaps) / steps, 1),
        "ms in gaps": _each(sum(gaps), steps),
        "launches": round(sum(event.get("cat") == "kernel" for event in events) / steps, 1),
        "ms of copies": _each(copied, steps),
        "of them beside kernels %": round(100 * overlap(copies, kernels) / copied, 1)
        if copied
        else None,
        "waits of the host": round(len(waits) / steps, 1),
        "ms of these waits": _each(sum(event["dur"] for event in waits), steps),
    }


def _is_wait(event: dict[str, Any]) -> bool:
    name = str(event.get("name"))
    asynchronous = "Async" in name
    is_call = event.get("cat") in ("cuda_runtime", "cuda_driver")
    return is_call and not asynchronous and any(word in name for word in _WAITS)


def _each(microseconds: float, steps: int) -> float:
    return round(microseconds / steps / 1000, 3)


def _spans(events: Sequence[dict[str, Any]], kinds: Sequence[str]) -> list[Span]:
    """Return the times in which any event of these kinds runs, in order, without overlap."""
    spans: list[Span] = []
    found = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds]
    for begin, end in sorted(found):
        if spans and begin <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(end, spans[-1][1]))
        else:
            spans.append((begin, end))
    return spans


def total(spans: Sequence[Span]) -> float:
    """Return the time that the spans cover."""
    return sum(end - begin for begin, end in spans)


def overlap(some: Sequence[Span], others: Sequence[Span]) -> float:
    """Return the time that both cover; both in order, without overlap of their own."""
    shared, index = 0.0, 0
    for begin, end in some:
        while index < len(others) and others[index][1] <= begin:
            index += 1
        for other_begin, other_end in others[index:]:
            if other_begin >= end:
                break
            shared += min(end, other_end) - max(begin, other_begin)
    return shared
