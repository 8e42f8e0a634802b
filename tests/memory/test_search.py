import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2scale.memory.search import MAX_TRIALS, SizeSearch


def run(border: int, guess: int, limit: int = 0) -> SizeSearch:
    """Search where up to ``border`` images fit."""
    search = SizeSearch(guess, limit)
    sizes = []
    while (size := search.next_size()) is not None:
        assert size >= 1
        assert size not in sizes
        sizes.append(size)
        search.record(size, size <= border)
    assert search.trials == len(sizes)
    assert search.trials <= MAX_TRIALS or all(size > border for size in sizes[:MAX_TRIALS])
    return search


@given(st.integers(1, 400), st.floats(0.97, 1.03))
def test_a_good_prediction_leads_to_97_per_cent_and_never_above(border, error):
    largest = run(border, round(border * error)).largest
    assert 0.97 * border - 1e-9 <= largest <= border


@given(st.integers(1, 60), st.integers(-1, 1))
def test_one_image_off_is_found_exactly(border, error):
    search = run(border, max(1, border + error))
    assert search.largest == border
    assert search.found_border


@given(st.integers(0, 400), st.integers(1, 400))
def test_any_prediction_ends_with_what_fits_or_with_one_that_does_not(border, guess):
    search = run(border, guess)
    assert search.largest <= border
    if border == 0:
        assert search.found_border  # a single image was tried
    else:
        assert search.largest >= 1


@pytest.mark.parametrize(("border", "expected"), [(9, 5), (5, 5), (3, 3)])
def test_no_more_than_wanted_is_tried(border, expected):
    assert run(border, 7, limit=5).largest == expected


def test_what_a_trial_has_taken_corrects_the_prediction():
    search = SizeSearch(10)
    assert search.next_size() == 10
    search.record(10, fits=True, expected=25)
    assert search.next_size() == 25
