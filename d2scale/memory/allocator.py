"""A model of torch's CUDA caching allocator: what it reserves for a stream of requests.

Numbers in, numbers out; no torch. It follows the allocator's defaults (no expandable segments,
no limit on splitting, one stream): ``c10/cuda/CUDACachingAllocator.cpp`` in torch.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

MIB = 2**20

# Every request is rounded up to a multiple of this.
ROUNDING = 512
# Requests up to this come from segments of SMALL_SEGMENT, shared with other small ones.
SMALL_REQUEST = MIB
SMALL_SEGMENT = 2 * MIB
# Larger requests below this come from segments of MEDIUM_SEGMENT ...
MEDIUM_REQUEST = 10 * MIB
MEDIUM_SEGMENT = 20 * MIB
# ... and the largest get a segment of their own, rounded up to a multiple of this.
LARGE_ROUNDING = 2 * MIB


class OutOfCapacity(Exception):  # noqa: N818 - the allocator's own word; never shown to a user
    """A request that does not fit, even after all unused segments were given back.

    Attributes:
        request: bytes that were asked for.
    """

    def __init__(self, request: int) -> None:
        super().__init__(f"no room for {request} bytes")
        self.request = request


def rounded_request(nbytes: int) -> int:
    """Return the bytes that a request occupies within a segment."""
    return max(ROUNDING, -(-nbytes // ROUNDING) * ROUNDING)


def segment_bytes(request: int) -> int:
    """Return the size of a new segment for a rounded request."""
    if request <= SMALL_REQUEST:
        return SMALL_SEGMENT
    if request < MEDIUM_REQUEST:
        return MEDIUM_SEGMENT
    return -(-request // LARGE_ROUNDING) * LARGE_ROUNDING


@dataclass(eq=False)
class _Block:
    """A piece of a segment; a segment is a chain of blocks."""

    address: int
    size: int
    pool: _Pool
    free: bool = False
    before: _Block | None = None
    after: _Block | None = None


@dataclass(eq=False)
class _Pool:
    """Free blocks, smallest first, then lowest address."""

    # A remainder at least this large becomes a block of its own.
    smallest_remainder: int
    free: list[tuple[int, int]] = field(default_factory=list)

    def add(self, block: _Block) -> None:
        insort(self.free, (block.size, block.address))

    def remove(self, block: _Block) -> None:
        del self.free[bisect_left(self.free, (block.size, block.address))]


class CachingAllocator:
    """The allocator of one device.

    Args:
        capacity: bytes that it may reserve; None: no limit.

    Attributes:
        allocated: bytes in use, each request rounded up.
        reserved: bytes taken from the device.
        peak_allocated, peak_reserved: the most so far.
        retries: times that unused segments had to be given back to make room.
    """

    def __init__(self, capacity: float | None = None) -> None:
        self.capacity = capacity
        self.allocated = self.reserved = 0
        self.peak_allocated = self.peak_reserved = 0
        self.retries = 0
        self._small = _Pool(smallest_remainder=ROUNDING)
        self._large = _Pool(smallest_remainder=SMALL_REQUEST + 1)
        self._blocks: dict[int, _Block] = {}
        self._next_address = 0

    def allocate(self, nbytes: int) -> int:
        """Serve a request and return its address.

        Raises:
            OutOfCapacity: if it does not fit.
        """
        request = rounded_request(nbytes)
        pool = self._small if request <= SMALL_REQUEST else self._large
        block = self._best_fit(pool, request) or self._new_segment(pool, request)
        if block.size - request >= pool.smallest_remainder:
            self._split(block, request)
        block.free = False
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block.address

    def release(self, address: int) -> None:
        """Take the bytes at ``address`` back into the cache."""
        block = self._blocks[address]
        self.allocated -= block.size
        block.free = True
        if block.before is not None and block.before.free:
            block.pool.remove(block.before)
            block = self._join(block.before)
        if block.after is not None and block.after.free:
            block.pool.remove(block.after)
            block = self._join(block)
        block.pool.add(block)

    def empty_cache(self) -> None:
        """Give segments that nothing uses back to the device."""
        for pool in (self._small, self._large):
            for _, address in list(pool.free):
                block = self._blocks[address]
                if block.before is None and block.after is None:
                    pool.remove(block)
                    del self._blocks[address]
                    self.reserved -= block.size

    def _best_fit(self, pool: _Pool, request: int) -> _Block | None:
        index = bisect_left(pool.free, (request, -1))
        if index == len(pool.free):
            return None
        _, address = pool.free.pop(index)
        return self._blocks[address]

    def _new_segment(self, pool: _Pool, request: int) -> _Block:
        size = segment_bytes(request)
        if self.capacity is not None and self.reserved + size > self.capacity:
            self.retries += 1
            self.empty_cache()
            if self.reserved + size > self.capacity:
                raise OutOfCapacity(request)
        block = _Block(self._next_address, size, pool)
        # Addresses only rise, so that the order of equal blocks is the order of their making.
        self._next_address += size
        self._blocks[block.address] = block
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return block

    def _split(self, block: _Block, request: int) -> None:
        rest = _Block(
            block.address + request, block.size - request, block.pool, True, block, block.after
        )
        if block.after is not None:
            block.after.before = rest
        block.size, block.after = request, rest
        self._blocks[rest.address] = rest
        block.pool.add(rest)

    def _join(self, block: _Block) -> _Block:
        """Unite ``block`` with the one after it; neither may be in a pool."""
        after = block.after
        assert after is not None
        del self._blocks[after.address]
        block.size += after.size
        block.after = after.after
        if block.after is not None:
            block.after.before = block
        return block
