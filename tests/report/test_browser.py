"""The page in a real browser, on a phone and on a desk, by day and by night."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import unescape

import pytest

from d2scale.report import write_report
from run_folders import detections, step_lines

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason=f"needs a browser: none of {', '.join(NAMES)}"),
]

# A window is at least 500 pixels wide; a frame may be as narrow as a phone.
WRAPPER = """\
<!DOCTYPE html><iframe id="frame" width="%d" height="800"></iframe>
<pre id="result"></pre>
<script>
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const shown = () => [...page.images].filter(image => image.getClientRects().length);
  const titles = () => shown().map(image => image.alt);
  const wide = [...page.querySelectorAll(".wide")];
  const facts = {
    window: root.clientWidth, page: root.scrollWidth,
    broken: [...page.images].filter(image => !image.naturalWidth).length,
    tables: wide.length,
    scrolling: wide.filter(box => box.scrollWidth > box.clientWidth).length,
    paper: frame.contentWindow.getComputedStyle(page.body).backgroundColor,
    dark: shown().filter(image => image.closest("picture") &&
      image.currentSrc === image.closest("picture").querySelector("source").srcset).length,
    before: titles(),
    requests: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name)
      .filter(name => !name.startsWith("data:")),
  };
  page.querySelector("label[for=axis-time]").click();
  facts.after = titles();
  result.textContent = JSON.stringify(facts);
};
frame.src = "report.html";
</script>
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture
def page(folder, make_run, shapes, monkeypatch):
    """A folder with report.html, written once."""
    if not (folder / "report.html").exists():
        monkeypatch.setattr("d2scale.report.curves._DOTS_PER_INCH", 60)
        names = ("iteration", "images_seen", "elapsed_seconds", "total_loss", "lr")
        lines = [{name: line[name] for name in names} for line in step_lines()]
        runs = [
            make_run(name, lines=lines, found=detections(shapes, shift=shift))
            for name, shift in (("first", 1.0), ("a-rather-long-name-of-a-run" * 3, 5.0))
        ]
        write_report(runs, folder / "report.html", published=True)
    return folder


def look(folder, width, scheme):
    """Open the page in a frame of ``width`` pixels and return what its script found."""
    wrapper = folder / f"wrapper-{width}.html"
    wrapper.write_text(WRAPPER % width)
    command = [
        *(CHROMIUM, "--headless", "--disable-gpu", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--no-first-run", "--hide-scrollbars"),
        *("--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND"),
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
        *(f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000"),
        *("--window-size=1400,900", "--dump-dom", wrapper.as_uri()),
    ]
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    assert found[1], done.stderr[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_shows_its_pictures_and_asks_for_nothing(page, width, scheme):
    facts = look(page, width, scheme)
    assert facts["window"] == width
    assert facts["page"] <= width
    assert facts["broken"] == 0
    assert facts["requests"] == []
    # Wide tables scroll in their own boxes.
    assert facts["tables"] >= 5
    assert facts["scrolling"] >= 1
    assert facts["paper"] == ("rgb(13, 17, 23)" if scheme == "dark" else "rgb(255, 255, 255)")
    assert facts["dark"] == (2 if scheme == "dark" else 0)


def test_the_reader_chooses_the_axis(page):
    facts = look(page, 1280, "light")
    assert facts["before"][:2] == [
        "total loss (total_loss), against images seen",
        "learning rate (lr), against images seen",
    ]
    assert facts["after"][:2] == [
        "total loss (total_loss), against time",
        "learning rate (lr), against time",
    ]
    # The examples stay.
    assert facts["before"][2:] == facts["after"][2:]
    assert len(facts["after"]) == 2 + 4 * 3
