import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2scale.memory.allocator import MIB, OutOfCapacity
from d2scale.memory.replay import MIXED_SIZES, needed_bytes, replay
from d2scale.memory.stream import Allocation, Line, Stream, Trace, upper_envelope


def record(images: int) -> Trace:
    """A step with a loop over the images: a result that stays, and a passing helper."""
    trace = Trace([Allocation("weight", (), "other", 100)])
    batch = Allocation("batch", (8,), "forward", 50 * images)
    trace.allocate(batch)
    results = []
    for _ in range(images):
        helper = Allocation("helper", (), "forward", 30)
        trace.allocate(helper)
        results.append(Allocation("result", (), "forward", 7))
        trace.allocate(results[-1])
        trace.free(helper)
    activation = Allocation("activation", (4,), "forward", 10 + 20 * images)
    trace.allocate(activation)
    gradient = Allocation("gradient", (), "backward", 400)
    trace.allocate(gradient)
    for allocation in (activation, batch, *results, gradient):
        trace.free(allocation)
    return trace


def peaks(images: int) -> dict[str, int]:
    trace = record(images)
    live = sum(allocation.nbytes for allocation in trace.held)
    peaks_of_phases: dict[str, int] = {}
    for event in trace.events:
        live += -event.allocation.nbytes if event.is_free else event.allocation.nbytes
        if not event.is_free:
            phase = event.allocation.phase
            peaks_of_phases[phase] = max(peaks_of_phases.get(phase, 0), live)
    return peaks_of_phases


def test_two_steps_tell_every_other():
    stream = Stream.from_traces(record(1), record(2))
    for images in (1, 2, 3, 7, 40):
        lines = stream.peak_lines()
        predicted = {name: max(line.at(images) for line in lines[name]) for name in lines}
        assert predicted == peaks(images)


def one_step(*operations):
    """A step whose allocations, (name, trailing shape, bytes), all live to its end."""
    trace = Trace([])
    for name, shape, nbytes in operations:
        trace.allocate(Allocation(name, shape, "forward", nbytes))
    return trace


def test_operations_in_another_order_are_the_same():
    one = one_step(("a", (), 1), ("b", (), 10), ("c", (), 100), ("d", (), 1))
    two = one_step(("a", (), 1), ("c", (), 200), ("b", (), 20), ("d", (), 1))
    stream = Stream.from_traces(one, two)
    assert max(line.at(5) for line in stream.peak_lines()["forward"]) == 2 + 50 + 500


def test_operations_whose_inner_dimension_counts_the_images_are_the_same():
    one = one_step(("a", (), 1), ("b", (7,), 70), ("c", (), 3))
    two = one_step(("a", (), 1), ("b", (14,), 140), ("c", (), 3))
    stream = Stream.from_traces(one, two)
    assert max(line.at(5) for line in stream.peak_lines()["forward"]) == 1 + 350 + 3


lines = st.lists(st.builds(Line, st.integers(0, 99), st.integers(0, 9)), min_size=1, max_size=8)


@given(lines, st.integers(1, 50))
def test_the_envelope_is_the_maximum_with_no_line_too_many(given, images):
    envelope = upper_envelope(given)
    assert max(line.at(images) for line in envelope) == max(line.at(images) for line in given)
    for line in envelope:
        others = [other for other in envelope if other != line]
        # A hundred images are beyond every crossing of these lines.
        grid = [1 + step / 8 for step in range(800)]
        assert not others or any(
            line.at(x) >= max(other.at(x) for other in others) - 1e-9 for x in grid
        )


def big_stream() -> Stream:
    def big(images):
        trace = Trace([Allocation("weight", (), "other", 3 * MIB)])
        allocations = [
            Allocation(str(i), (), "forward", images * (12 + 7 * (i % 3)) * MIB) for i in range(9)
        ]
        for index, allocation in enumerate(allocations):
            trace.allocate(allocation)
            if index % 2:
                trace.free(allocations[index - 1])
        for allocation in allocations[1::2] + allocations[8:]:
            trace.free(allocation)
        return trace

    return Stream.from_traces(big(1), big(2))


def test_what_is_needed_is_between_what_lives_and_what_is_reserved_freely():
    stream = big_stream()
    for images in (1, 2, 5):
        mixed = [images * part for part in MIXED_SIZES]
        needed = needed_bytes(stream, images)
        live = max(line.at(images) for line in stream.peak_lines()["forward"])
        assert live <= needed <= replay(stream, mixed).peak_reserved
        assert replay(stream, mixed, capacity=needed).peak_reserved <= needed
        with pytest.raises(OutOfCapacity):
            replay(stream, mixed, capacity=live - 1)


def test_what_is_held_besides_adds_to_the_reservation():
    stream = big_stream()
    more = replay(stream, [1], held=[64 * MIB]).peak_reserved
    assert more == replay(stream, [1]).peak_reserved + 64 * MIB
