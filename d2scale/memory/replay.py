"""Training steps replayed through the model of the allocator: what they reserve and need."""

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
) -> CachingAllocator:
    """Replay steps and return the allocator after them.

    Args:
        stream: the step.
        images: number of images of each step, in units of the traced size.
        capacity: bytes that the allocator may reserve; None: no limit.
        held: requests that outlive every step, besides the stream's own.

    Raises:
        OutOfCapacity: if a request does not fit.
    """
    allocator = CachingAllocator(capacity)
    for nbytes in (*stream.held, *held):
        allocator.allocate(nbytes)
    for count in images:
        _replay_step(stream, count, allocator)
    return allocator


def _replay_step(stream: Stream, images: float, allocator: CachingAllocator) -> None:
    sizes = stream.request_bytes(images)
    addresses: dict[int, int] = {}
    for index, is_free in stream.events:
        if is_free:
            if index in addresses:
                allocator.release(addresses.pop(index))
        elif sizes[index]:
            addresses[index] = allocator.allocate(sizes[index])
    # What a step leaves, its gradients, is freed before the next begins.
    for address in addresses.values():
        allocator.release(address)


def needed_bytes(stream: Stream, images: float, *, held: Sequence[int] = ()) -> int:
    """Return the bytes that the allocator must be given for steps of mixed sizes.

    With less than it would like, the allocator gives cached segments back and starts anew, so
    this is less than what it reserves when nothing limits it.

    Args:
        stream: the step.
        images: images of the largest step, in units of the traced size.
        held: see :func:`replay`.
    """
    counts = [images * part for part in MIXED_SIZES]
    free = replay(stream, counts, held=held)
    low, high = float(free.peak_allocated), float(free.peak_reserved)
    high = min(high, low * (1 + _SEARCH_FRACTION) + _SEARCH_BYTES)
    while high - low > low * _RESOLUTION:
        middle = (low + high) / 2
        try:
            replay(stream, counts, capacity=middle, held=held)
            high = middle
        except OutOfCapacity:
            low = middle
    return round(high)
