import io

import numpy as np
import pytest
from PIL import Image

from d2scale.report.drawing import class_colour, draw_boxes, to_jpeg

GREY = np.full((100, 120, 3), 90, dtype=np.uint8)


def has(image, colour, box):
    """Count pixels of a colour within x0 y0 x1 y1."""
    x0, y0, x1, y1 = box
    return int((image[y0 : y1 + 1, x0 : x1 + 1] == colour).all(axis=2).sum())


def test_a_box_has_its_outline_where_it_is_and_its_label_above():
    drawn = draw_boxes(GREY, np.array([[20, 40, 80, 90]]), np.array([1]), ["dog", "cat"])
    colour = class_colour(1)
    for x, y in ((20, 60), (80, 60), (50, 40), (50, 90)):
        assert tuple(drawn[y, x]) == colour
    assert tuple(drawn[60, 50]) == (90, 90, 90)
    assert has(drawn, colour, (20, 20, 60, 39)) > 50
    assert (GREY == 90).all()


def test_labels_differ_with_name_and_score():
    box, number = np.array([[20, 40, 80, 90]]), np.array([0])
    plain, other = (draw_boxes(GREY, box, number, [name]) for name in ("dog", "cow"))
    scored = draw_boxes(GREY, box, number, ["dog"], np.array([0.5]))
    assert (plain != other).any()
    assert has(scored, class_colour(0), (20, 20, 119, 39)) > has(
        plain, class_colour(0), (20, 20, 119, 39)
    )


def test_a_name_that_the_font_cannot_draw_is_its_number():
    box, number = np.array([[20, 40, 80, 90]]), np.array([1])
    plain, foreign = (draw_boxes(GREY, box, number, ["dog", name]) for name in ("1", "\u72ac"))
    np.testing.assert_array_equal(plain, foreign)


def test_the_best_is_on_top():
    boxes = np.array([[20, 40, 80, 90], [20, 40, 80, 90]])
    classes, names = np.array([0, 1]), ["dog", "dog"]
    for scores, winner in (((0.9, 0.1), 0), ((0.1, 0.9), 1)):
        drawn = draw_boxes(GREY, boxes, classes, names, np.array(scores))
        assert tuple(drawn[60, 20]) == class_colour(winner)


def test_at_the_edges_everything_stays_inside():
    boxes = np.array([[-50, -50, 30, 20], [100, 80, 500, 500], [5, 5, 5, 5]])
    drawn = draw_boxes(GREY, boxes, np.array([0, 1, 2]), ["a", "b", "c"])
    assert drawn.shape == GREY.shape
    assert tuple(drawn[19, 0]) == class_colour(0)
    assert tuple(drawn[99, 110]) == class_colour(1)


def test_boxes_that_are_none_are_left_out():
    boxes = np.array([[np.nan, 0, 9, 9], [0, 0, np.inf, 9], [300, 300, 400, 400], [9, 9, 2, 2]])
    drawn = draw_boxes(GREY, boxes, np.arange(4), ["a"])
    np.testing.assert_array_equal(drawn, GREY)
    nothing = draw_boxes(GREY, np.zeros((0, 4)), np.zeros(0, int), [])
    np.testing.assert_array_equal(nothing, GREY)


@pytest.mark.parametrize("name", ["", "犬", "a\nb", "x" * 300])
def test_any_name_can_be_drawn_on_any_size(name):
    tiny = np.zeros((1, 1, 3), dtype=np.uint8)
    for image in (GREY, tiny):
        assert draw_boxes(image, np.array([[0, 0, 50, 50]]), [0], [name]).shape == image.shape


def test_class_numbers_beyond_the_names_show_themselves():
    box = np.array([[20, 40, 80, 90]])
    np.testing.assert_array_equal(
        draw_boxes(GREY, box, [7], ["dog"]), draw_boxes(GREY, box, [7], ["7"] * 8)
    )


def test_neighbouring_classes_differ_much():
    colours = np.array([class_colour(number) for number in range(80)]).astype(int)
    assert len({tuple(colour) for colour in colours.tolist()}) == 80
    assert np.abs(np.diff(colours, axis=0)).max(axis=1).min() > 60
    nearest = [
        np.abs(colours - colour).max(axis=1)[np.arange(80) != number].min()
        for number, colour in enumerate(colours)
    ]
    assert min(nearest) > 10


@pytest.mark.parametrize(
    ("image", "boxes", "classes"),
    [
        (GREY.astype(float), [[0, 0, 1, 1]], [0]),
        (GREY[..., 0], [[0, 0, 1, 1]], [0]),
        (GREY, [[0, 0, 1, 1]], [0, 1]),
    ],
)
def test_arrays_of_another_form_are_refused(image, boxes, classes):
    with pytest.raises(ValueError, match="need"):
        draw_boxes(image, np.array(boxes), classes, ["a"])


def test_a_picture_too_large_for_jpeg_is_made_smaller():
    for width, expected in ((70_000, (65_500, 19)), (65_500, (65_500, 20))):
        content = to_jpeg(np.zeros((20, width, 3), np.uint8), 80)
        assert Image.open(io.BytesIO(content)).size == expected
