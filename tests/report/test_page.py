import re
from base64 import b64decode
from html.parser import HTMLParser

from d2scale.report.document import Cell, Document, Picture, Section, Table
from d2scale.report.page import to_html, to_markdown

NASTY = "<script>alert(1)</script>&\"'|`*_"


def document(text):
    table = Table(
        text, ("", text), ((Cell(text), Cell(text, text, strong=True)),), (text,), folded=False
    )
    folded = Table(text, ("", text), ((Cell(text), Cell(text)),), folded=True, in_markdown=False)
    curves = [
        Picture(f"lr-{axis}.png", text, f"{axis} light".encode(), b"dark", axis=axis)
        for axis in ("images", "iterations", "time")
    ]
    example = Picture("example.jpg", text, b"photo", group="1")
    sections = (
        Section(text, (text,), (table, folded)),
        Section(text, (), (), tuple(curves)),
        Section(text, (), (), (example,)),
    )
    return Document(text, (text,), sections, (text,), curves[0])


class Reader(HTMLParser):
    """Collects elements and checks that they nest."""

    VOID = ("meta", "input", "img", "source", "br", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_what_comes_from_run_folders_is_text_and_nothing_else():
    reader = read(to_html(document(NASTY)))
    plain = read(to_html(document("plain")))
    assert [tag for tag, _ in reader.tags] == [tag for tag, _ in plain.tags]
    assert "script" not in {tag for tag, _ in reader.tags}
    assert reader.text.count(NASTY) == plain.text.count("plain")
    (alternative, *_) = (tags["alt"] for tag, tags in reader.tags if tag == "img")
    assert alternative == NASTY


def test_the_page_needs_nothing_else():
    html = to_html(document("plain"))
    reader = read(html)
    for tag, attributes in reader.tags:
        assert tag not in ("link", "script", "iframe", "object", "embed")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset"):
                assert value.startswith("data:image/")
            assert name != "href"
    assert not re.search(r"url\(|@import|https?:", html)


def test_pictures_are_inside_for_light_and_dark():
    reader = read(to_html(document("plain")))
    sources = [tags["src"] for tag, tags in reader.tags if tag == "img"]
    contents = [b64decode(source.partition("base64,")[2]) for source in sources]
    assert contents == [b"images light", b"iterations light", b"time light", b"photo"]
    assert [source[:16] for source in sources] == ["data:image/png;b"] * 3 + ["data:image/jpeg;"]
    dark = [tags for tag, tags in reader.tags if tag == "source"]
    assert len(dark) == 3
    assert all(tags["media"] == "(prefers-color-scheme: dark)" for tags in dark)


def test_one_axis_is_shown_and_images_seen_first():
    reader = read(to_html(document("plain")))
    buttons = [tags for tag, tags in reader.tags if tag == "input"]
    assert [tags["id"] for tags in buttons] == ["axis-images", "axis-iterations", "axis-time"]
    assert ["checked" in tags for tags in buttons] == [True, False, False]
    labels = [tags["for"] for tag, tags in reader.tags if tag == "label"]
    assert labels == [tags["id"] for tags in buttons]
    html = to_html(document("plain"))
    for tags in buttons:
        assert f"#{tags['id']}:checked ~ .by-{tags['id'].removeprefix('axis-')}" in html


def test_markdown_for_a_pull_request():
    text = to_markdown(document("plain"), "my report_files")
    assert "![plain](my%20report_files/lr-images.png)" in text
    assert "| plain | **plain** (plain) |" in text
    # The folded table and the sections of pictures stay on the page.
    assert text.count("\n## ") == 2
    assert text.count("| --- | --- |") == 1


def test_markdown_shows_names_as_they_are():
    text = to_markdown(document(NASTY), "files")
    assert "<script>" not in text
    row = next(line for line in text.splitlines() if line.startswith("| &lt;script"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert "\\|\\`\\*\\_" in row
    assert "line one line two" in to_markdown(document("line one\nline two"), "files")
