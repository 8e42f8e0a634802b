from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2scale.coco.sizes import aspect_ratio_groups, output_size


@pytest.mark.parametrize(
    ("height", "width", "short_edge", "max_size", "expected"),
    [
        (480, 640, 800, 1333, (800, 1067)),
        (640, 480, 800, 1333, (1067, 800)),
        (427, 640, 640, 1333, (640, 959)),
        (426, 640, 800, 1333, (800, 1202)),
        (300, 640, 800, 1333, (625, 1333)),
        (500, 333, 672, 1333, (1009, 672)),
        (500, 500, 800, 700, (700, 700)),
        (480, 640, 0, 100, (480, 640)),
        (1, 5000, 100, 200, (1, 200)),
    ],
)
def test_sizes_are_detectron2s(height, width, short_edge, max_size, expected):
    assert output_size(height, width, short_edge, max_size) == expected


@given(
    height=st.integers(30, 1500),
    width=st.integers(30, 1500),
    short_edge=st.integers(30, 1000),
    max_size=st.integers(100, 1333),
)
def test_sizes_keep_to_their_limits(height, width, short_edge, max_size):
    new_height, new_width = output_size(height, width, short_edge, max_size)
    assert max(new_height, new_width) <= max(max_size, short_edge)
    assert min(new_height, new_width) <= short_edge
    assert max(new_height, new_width) == max_size or min(new_height, new_width) == short_edge
    assert (new_height, new_width) == output_size(width, height, short_edge, max_size)[::-1]


def test_square_images_go_with_the_high_ones():
    widths, heights = np.array([4, 3, 3]), np.array([3, 3, 4])
    assert aspect_ratio_groups(widths, heights).tolist() == [0, 1, 1]
