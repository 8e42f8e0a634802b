import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2scale.errors import ConfigError
from d2scale.planning.gpu_assumptions import context_bytes
from d2scale.planning.memory_profile import (
    MEASURED,
    PREDICTED,
    MemoryProfile,
    Phase,
    load_profiles,
)

sizes = st.integers(0, 2**40)


@given(sizes, st.integers(1, 2**34), sizes, st.integers(0, 2**42))
def test_the_largest_that_fits_fits_and_the_next_does_not(static, per_image, optimizer, budget):
    profile = MemoryProfile(
        (Phase("backward", static, per_image), Phase("optimizer", optimizer, 0)), "measured"
    )
    largest = profile.largest_ims_per_gpu(budget)
    if largest:
        assert profile.peak_bytes(largest) <= budget
    assert profile.peak_bytes(largest + 1) > budget


def test_the_peak_of_a_small_model_is_its_optimizer_step():
    profile = MemoryProfile((Phase("backward", 10, 5), Phase("optimizer", 100, 0)), "measured")
    assert [profile.peak_bytes(m) for m in (1, 18, 20)] == [100, 100, 110]


def test_a_file_comes_back_as_it_was(tmp_path):
    profile = MemoryProfile((Phase("backward", 10, 5),), "predicted", "R-50 at 800x1333")
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile.to_json()))
    assert load_profiles(str(path)) == (profile,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON"),
        ("[1]", "d2scale memory profile"),
        ('{"format": "d2scale memory profile", "version": 9}', "version 1"),
        ('{"format": "d2scale memory profile", "version": 1}', "phases"),
        (
            '{"format": "d2scale memory profile", "version": 1, "source": "measured", "phases": '
            '[{"name": "backward", "static_bytes": -1, "bytes_per_image": 5}]}',
            "0 or more",
        ),
        (
            '{"format": "d2scale memory profile", "version": 1, "source": "measured", "phases": '
            '[{"name": "backward", "static_bytes": 1, "bytes_per_image": 0}]}',
            "grows with the images",
        ),
        (
            '{"format": "d2scale memory profile", "version": 2, "source": "magic", "phases": '
            '[{"name": "backward", "static_bytes": 1, "bytes_per_image": 5}]}',
            "predicted or measured",
        ),
        (
            '{"format": "d2scale memory profile", "version": 2, "source": "measured", "phases": '
            '[{"name": "backward", "static_bytes": 1' + "0" * 400 + ', "bytes_per_image": 5}]}',
            "whole numbers of bytes",
        ),
        ("[" * 10**6, "JSON"),
    ],
)
def test_what_is_no_profile_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load_profiles(str(path))
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        load_profiles(str(tmp_path / "nowhere.json"))


def test_a_file_of_the_first_version_still_reads(tmp_path):
    path = tmp_path / "profile.json"
    content = {
        "format": "d2scale memory profile",
        "version": 1,
        "source": "predicted",
        "phases": [{"name": "backward", "static_bytes": 10, "bytes_per_image": 5}],
        "gradient_bytes": 7,
    }
    path.write_text(json.dumps(content))
    (profile,) = load_profiles(str(path))
    # Several ranks held the gradients twice when it was written.
    assert profile.peak_bytes(1, world_size=2) == 10 + 5 + 7


def test_a_predicted_context_follows_the_gpu_at_hand_and_a_measured_one_stays():
    predicted = MemoryProfile((Phase("backward", 0, 1),), PREDICTED, context_bytes=7)
    assert predicted.on_gpu(9).context_bytes == context_bytes(9)
    measured = replace(predicted, source=MEASURED)
    assert measured.on_gpu(9) == measured
    by_hand = replace(predicted, context_bytes=0)
    assert by_hand.on_gpu(9) == by_hand
