import io

import numpy as np
import pytest
from PIL import Image

from d2scale.report.curves import curve_names, draw_curves, draw_overview, smooth
from d2scale.report.runs import read_run
from d2scale.report.styles import DARK, LIGHT, line_of
from run_folders import GAIN_CONFIG, gain_lines, step_lines


@pytest.fixture
def runs(make_run):
    return [
        read_run(make_run("one"), "one"),
        read_run(make_run("two", lines=step_lines(10, batch=16)), "two"),
    ]


def test_published_curves_in_their_order_then_other_losses(make_run, runs):
    other = read_run(make_run("other", lines=step_lines(loss_iou=1.0)), "other")
    assert curve_names(runs) == (
        "total_loss",
        "loss_fcos_cls",
        "loss_fcos_ctr",
        "loss_fcos_loc",
        "lr",
        "time",
        "data_time",
    )
    assert curve_names([*runs, other])[4:6] == ("loss_iou", "lr")


def pixels(content):
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def near(image, colour):
    """Count pixels of about this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.abs(image - wanted).max(axis=2) < 24).sum())


def test_every_curve_against_every_axis_in_light_and_dark(runs, monkeypatch):
    for run in runs:
        for row in run.history.rows:
            for name in [key for key in row.values if key not in ("total_loss", "lr")]:
                del row.values[name]
    pictures = draw_curves(runs)
    assert [(picture.name, picture.axis) for picture in pictures] == [
        (f"{name}-{axis}.png", axis)
        for name in ("total_loss", "lr")
        for axis in ("images", "iterations", "time")
    ]
    for picture in pictures:
        for content, theme in ((picture.light, LIGHT), (picture.dark, DARK)):
            image = pixels(content)
            assert image.shape[1] == 960
            assert near(image, theme.paper) > 0.7 * image[..., 0].size
            assert near(image, theme.lines[0]) > 300
            assert near(image, theme.lines[1]) > 300


def test_nothing_reported_draws_nothing(make_run):
    empty = read_run(make_run(lines=[]), "empty")
    assert draw_curves([empty]) == ()
    assert draw_overview([empty]) is None


def test_curves_without_images_seen_lack_only_that_axis(make_run):
    lines = [{"iteration": i, "lr": 0.1 * i, "time": 1.0} for i in range(3)]
    run = read_run(make_run(lines=lines, config={"SOLVER": {"IMS_PER_BATCH": "?"}}), "run")
    assert {picture.axis for picture in draw_curves([run])} == {"iterations", "time"}


@pytest.mark.parametrize("name", ["_hidden", "$x$ $", "a\\b{", "实验", "<b>", "x" * 200])
def test_any_name_can_be_drawn(make_run, name):
    lines = [{"iteration": 0, "images_seen": 1, "elapsed_seconds": 1, "lr": 0.1}]
    (picture, *_) = draw_curves([read_run(make_run(lines=lines), name)])
    # Its line in the legend; a single point has a marker.
    assert near(pixels(picture.light), LIGHT.lines[0]) > 50


def test_a_run_whose_name_the_font_lacks_is_known_by_its_place(make_run):
    folder = make_run("run")
    drawn = [draw_overview([read_run(folder, name)]) for name in ("\u57fa", "run 1", "run")]
    foreign, placed, named = (pixels(picture.light) for picture in drawn)
    np.testing.assert_array_equal(foreign, placed)
    assert (foreign != named).any()


def test_smoothing_is_a_mean_over_the_same_images_for_every_batch():
    fine, coarse = np.arange(0.0, 100, 1), np.arange(0.0, 100, 4)
    assert smooth(coarse, np.full(25, 3.0), 10).tolist() == [3.0] * 25
    means = smooth(fine, fine, 10)
    # A straight line stays one, away from its ends.
    np.testing.assert_allclose(means[10:-10], fine[10:-10])
    np.testing.assert_allclose(smooth(coarse, coarse, 8)[3:-3], coarse[3:-3])


def test_lines_differ_in_colour_or_style():
    looks = {str(line_of(LIGHT, number)) for number in range(30)}
    assert len(looks) == 30
    styles = [line_of(LIGHT, number) for number in range(5)]
    assert len({colour for colour, _ in styles}) == len({str(dash) for _, dash in styles}) == 5


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_and_text_stand_out_from_the_paper(theme):
    """The Web Content Accessibility Guidelines ask 3 of lines and 4.5 of text."""

    def contrast(one, other):
        low, high = sorted((luminance(one), luminance(other)))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(line, theme.paper) > 3 for line in theme.lines)
    assert contrast(theme.ink, theme.paper) > 7


def test_noise_scale_and_gain_are_drawn_where_they_are(make_run, runs):
    gain = read_run(make_run("gain", lines=gain_lines(), config=GAIN_CONFIG), "gain")
    assert curve_names([*runs, gain])[4:7] == ("lr", "noise_scale", "gain")
    names = {picture.name for picture in draw_curves([gain])}
    assert {"noise_scale-images.png", "gain-iterations.png"} <= names
    nothing = step_lines(4)
    nothing[0]["noise_scale"], nothing[1]["noise_scale"] = None, 0.0
    run = read_run(make_run("nothing", lines=nothing), "nothing")
    assert not [picture for picture in draw_curves([run]) if "noise" in picture.name]


def test_the_noise_scale_is_drawn_on_powers_of_ten(make_run):
    # From 10 to 10 000 in even steps of its logarithm: a straight line, half of it in each half.
    lines = gain_lines(160)
    for number, line in enumerate(lines):
        line["noise_scale"] = 10 ** (1 + 3 * number / (len(lines) - 1))
    run = read_run(make_run("gain", lines=lines, config=GAIN_CONFIG), "gain")
    (picture,) = [each for each in draw_curves([run]) if each.name == "noise_scale-images.png"]
    image = pixels(picture.light)
    middle = image.shape[1] * 15 // 28
    counts = [near(half, LIGHT.lines[0]) for half in (image[:, :middle], image[:, middle:])]
    assert min(counts) > 0.5 * max(counts)
    height = image.shape[0]
    places = np.argwhere(np.abs(image - np.array([0, 114, 178])).max(axis=2) < 24)
    assert np.median(places[:, 0]) == pytest.approx(0.46 * height, abs=0.12 * height)
