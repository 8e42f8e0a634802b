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
    assert search.trials == len(sizes) >= 1
    assert search.trials <= MAX_TRIALS or all(size > border for size in sizes[:MAX_TRIALS])
    return search


def test_a_prediction_10_per_cent_off_leads_to_97_per_cent_and_never_above():
    for border in range(1, 301):
        for guess in range(max(1, round(0.9 * border)), round(1.1 * border) + 1):
            search = run(border, guess)
            assert 0.97 * border <= search.largest <= border
            assert search.trials <= MAX_TRIALS


@given(st.integers(1, 400))
def test_a_right_prediction_is_confirmed_with_few_sizes(border):
    search = run(border, border)
    assert search.largest >= 0.98 * border
    assert search.trials == 2 or border > 50


@given(st.integers(1, 60), st.integers(-1, 1))
def test_one_image_off_is_found_exactly(border, error):
    search = run(border, max(1, border + error))
    assert search.largest == border
    assert search.next_size() is None


@given(st.integers(0, 400), st.integers(1, 400))
def test_any_prediction_ends_with_what_fits_or_with_one_that_does_not(border, guess):
    search = run(border, guess)
    assert min(border, 1) <= search.largest <= border


@pytest.mark.parametrize(("border", "expected"), [(9, 5), (5, 5), (3, 3)])
def test_no_more_than_wanted_is_tried(border, expected):
    assert run(border, 7, limit=5).largest == expected


def test_what_a_trial_has_taken_corrects_the_prediction():
    search = SizeSearch(10)
    assert search.next_size() == 10
    search.record(10, fits=True, expected=25)
    assert search.next_size() == 25
    search.record(25, fits=False)
    assert search.next_size() == 23  # near what was expected, not halfway to 10
