"""Training steps played through the allocator model: what they reserve, what they need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from d2scale.memory.allocator import MIB, CachingAllocator, OutOfCapacity
from d2scale.memory.stream import Stream

# Steps whose images are smaller than the largest, as parts of its area: what multi-scale
# training does to the allocator's cache. The largest comes again, into what they left behind.
MIXED_SIZES = (1.0, 0.64, 1.0, 0.81, 1.0)

# How far above the live bytes the search for what is needed begins, and how fine it is.
_SEARCH_FRACTION = 0.5
_SEARCH_BYTES = 256 * MIB
_RESOLUTION = 1 / 256


def replay(
    stream: Stream,
    images: Iterable[float],
    *,
    capacity: float | None = None,
    held: Sequence[int] = (),
    workspace_factor: float = 0.0,
) -> CachingAllocator:
    """Play steps and return the allocator after them.

    Args:
        stream: the step.
        images: images of each step to play, in units of the traced size.
        capacity: bytes that the allocator may reserve; None: no limit.
        held: requests that outlive every step, besides the stream's own.
        workspace_factor: what share of the recorded workspaces is requested.

    Raises:
        OutOfCapacity: if a request does not fit.
    """
    allocator = CachingAllocator(capacity)
    for nbytes in (*stream.held, *held):
        allocator.allocate(nbytes)
    for count in images:
        _play(stream, count, allocator, workspace_factor)
    return allocator


def _play(
    stream: Stream, images: float, allocator: CachingAllocator, workspace_factor: float
) -> None:
    sizes = stream.request_bytes(images)
    addresses: dict[int, int] = {}
    for index, is_free in stream.events:
        if is_free:
            if index in addresses:
                allocator.release(addresses.pop(index))
            continue
        nbytes = sizes[index]
        if stream.workspaces[index]:
            nbytes = round(nbytes * workspace_factor)
        if nbytes:
            addresses[index] = allocator.allocate(nbytes)
    # What a step leaves behind takes the place of what the step before it left.
    for address in addresses.values():
        allocator.release(address)


def needed_bytes(
    stream: Stream, images: float, *, held: Sequence[int] = (), workspace_factor: float = 0.0
) -> int:
    """Return the bytes that the allocator must be given for steps of mixed sizes.

    With less than it would like, the allocator gives cached segments back and starts anew, so
    this is less than what it reserves when nothing limits it.

    Args:
        stream: the step.
        images: images of the largest step, in units of the traced size.
        held, workspace_factor: see :func:`replay`.
    """
    counts = [images * part for part in MIXED_SIZES]

    def run(capacity: float | None) -> CachingAllocator:
        return replay(
            stream, counts, capacity=capacity, held=held, workspace_factor=workspace_factor
        )

    free = run(None)
    low, high = float(free.peak_allocated), float(free.peak_reserved)
    high = min(high, low * (1 + _SEARCH_FRACTION) + _SEARCH_BYTES)
    while high - low > low * _RESOLUTION:
        middle = (low + high) / 2
        try:
            run(middle)
            high = middle
        except OutOfCapacity:
            low = middle
    return round(high)
