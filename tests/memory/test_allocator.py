import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2scale.memory.allocator import MIB, CachingAllocator, OutOfCapacity, rounded_request

# Sizes around every threshold: 512 bytes, 1 MiB, 10 MiB.
requests = st.one_of(
    st.integers(1, 2000), st.integers(MIB - 600, MIB + 600), st.integers(1, 40 * MIB)
)


@pytest.mark.parametrize(
    ("nbytes", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
        (33 * MIB + 1, 34 * MIB),
    ],
)
def test_segments_have_torchs_sizes(nbytes, reserved):
    allocator = CachingAllocator()
    allocator.allocate(nbytes)
    assert allocator.reserved == reserved


def test_small_requests_share_a_segment():
    allocator = CachingAllocator()
    for _ in range(4096):
        allocator.allocate(512)
    assert allocator.reserved == 2 * MIB
    allocator.allocate(1)
    assert allocator.reserved == 4 * MIB


def test_a_freed_block_is_split_and_its_parts_unite_again():
    allocator = CachingAllocator()
    whole = allocator.allocate(32 * MIB)
    allocator.release(whole)
    parts = [allocator.allocate(12 * MIB) for _ in range(2)]
    assert allocator.reserved == 32 * MIB
    for part in parts:
        allocator.release(part)
    assert allocator.allocate(32 * MIB) == whole
    assert allocator.reserved == 32 * MIB


def test_a_remainder_of_up_to_one_mib_stays_with_a_large_block():
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(32 * MIB))
    allocator.allocate(31 * MIB)
    assert allocator.allocated == 32 * MIB


def test_the_best_fit_is_taken():
    allocator = CachingAllocator()
    large, small = allocator.allocate(64 * MIB), allocator.allocate(20 * MIB)
    allocator.release(large)
    allocator.release(small)
    assert allocator.allocate(18 * MIB) == small


def test_unused_segments_make_room_before_it_runs_out():
    allocator = CachingAllocator(capacity=64 * MIB)
    allocator.release(allocator.allocate(40 * MIB))
    kept = allocator.allocate(50 * MIB)
    assert (allocator.retries, allocator.reserved) == (1, 50 * MIB)
    with pytest.raises(OutOfCapacity):
        allocator.allocate(20 * MIB)
    allocator.release(kept)
    allocator.allocate(64 * MIB)


@given(st.lists(st.tuples(requests, st.booleans()), max_size=60))
def test_blocks_never_overlap_and_everything_comes_back(actions):
    allocator = CachingAllocator()
    live: dict[int, int] = {}
    for nbytes, frees in actions:
        address = allocator.allocate(nbytes)
        assert all(
            address >= start + rounded_request(size) or start >= address + rounded_request(nbytes)
            for start, size in live.items()
        )
        live[address] = nbytes
        if frees:
            oldest = next(iter(live))
            del live[oldest]
            allocator.release(oldest)
        assert sum(map(rounded_request, live.values())) <= allocator.allocated
        assert allocator.allocated <= allocator.reserved <= allocator.peak_reserved
    for address in live:
        allocator.release(address)
    assert allocator.allocated == 0
    allocator.empty_cache()
    assert allocator.reserved == 0
