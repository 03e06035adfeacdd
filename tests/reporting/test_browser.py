"""The page in a real browser: Chromium, as Debian packages it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from mergekit_arm.reporting.page import render
from mergekit_arm.reporting.statistics import statistics_page
from mergekit_arm.reporting.stream import stream_page
from mergekit_arm.reporting.tune import tune_page
from mergekit_arm.statistics.read import Statistics
from tests.reporting.scene import EVIL, Parsed, evil_state, write_evil_search

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]

PROBE = """<script>
addEventListener("load", async () => {
  const said = {inner: innerWidth, scroll: document.documentElement.scrollWidth, figures: []};
  for (const one of document.querySelectorAll(".js-plotly-plot")) {
    const {left, right, height} = one.querySelector(".main-svg").getBoundingClientRect();
    const png = await Plotly.toImage(one, {format: "png", width: 400, height: 300});
    said.figures.push({name: one.id, left, right, height, png: png.slice(0, 40)});
  }
  said.loaded = performance.getEntriesByType("resource").map((one) => one.name);
  parent.postMessage(said, "*");
});
</script>"""
"""Says how wide the page and its figures are and what was loaded, and makes PNGs of the figures."""

CLICKS = """<script>
addEventListener("load", async () => {
  const saved = [], contents = {}, Plain = Blob, naming = URL.createObjectURL;
  window.Blob = function (parts, options) {
    return Object.assign(new Plain(parts, options), {content: parts[0]});
  };
  URL.createObjectURL = (blob) => {
    const name = naming.call(URL, blob);
    contents[name] = blob.content;
    return name;
  };
  HTMLAnchorElement.prototype.click = function () {
    const header = new DataView(contents[this.href]);  // of a PNG: its name, width and height
    saved.push([this.download, ...[1, 16, 20].map((place) => header.getUint32(place))]);
  };
  const buttons = [...document.querySelectorAll("button[data-figure]")];
  buttons.forEach((one) => one.click());
  while (saved.length < buttons.length) await new Promise((done) => setTimeout(done, 50));
  const said = document.createElement("pre");
  said.textContent = JSON.stringify({saved});
  document.body.append(said);
});
</script>"""
"""Clicks every button, and says what would have been saved."""

FRAMES = """<!DOCTYPE html><body>
<script>addEventListener("message", (one) => {
  const said = document.createElement("pre");
  said.textContent = JSON.stringify(one.data);
  document.body.append(said);
});</script>
"""
"""Frames are as narrow as they are asked to be; a window of Chromium is not."""

IMAGE = '<img src="http://127.0.0.1:9/x.png">'


def browse(page: Path, profile: Path) -> tuple[Parsed, list[str]]:
    """Return the document as it is after all scripts, and what the console says."""
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update",
            f"--user-data-dir={profile}", "--enable-logging=stderr",
            "--virtual-time-budget=20000", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return Parsed(done.stdout), [one for one in done.stderr.splitlines() if "CONSOLE" in one]


@pytest.fixture(scope="module")
def page(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of figure, and markup in every name."""
    folder = tmp_path_factory.mktemp("page")
    shown = stream_page(Path(EVIL), evil_state())
    drawings = [
        *shown.drawings,
        *statistics_page(Statistics("stats", family / "stats")).drawings,
        *tune_page(write_evil_search(folder / "out")).drawings,
    ]
    text = render(replace(shown, drawings=drawings, notes=[EVIL], listings=[(EVIL, EVIL * 9)]))
    (folder / "page.html").write_text(text)
    return folder / "page.html"


def probed(page: Path, more: str = "", *, policy: bool = False, probe: str = PROBE) -> str:
    """Return the page with a probe in it, which its policy lets run, or without a policy."""
    text = page.read_text(encoding="utf-8")
    if policy:
        script = probe.removeprefix("<script>").removesuffix("</script>")
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        text, count = re.subn("script-src ", f"script-src 'sha256-{digest}' ", text, count=1)
    else:
        text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert count == 1
    return text.replace("</body>", f"{more}{probe}</body>")


def test_it_draws_everything_and_the_console_is_silent(page: Path, tmp_path: Path) -> None:
    shown, console = browse(page, tmp_path / "profile")
    assert not console
    classes = [str(attributes.get("class")) for _, attributes in shown.tags]
    figures = len(shown.titles())
    assert figures == 13
    assert sum("js-plotly-plot" in one for one in classes) == figures
    assert sum(one == "plot-container plotly" for one in classes) == figures
    tags = {tag for tag, _ in shown.tags}
    assert not {"img", "b", "iframe", "link", "object"} & tags
    assert not [a for tag, a in shown.tags if tag == "a" and ("href" in a or "xlink:href" in a)]
    assert "bold</b>" in "".join(shown.shown)  # letter by letter, in the figures too


def test_the_console_would_tell_of_what_the_policy_forbids(page: Path, tmp_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(
        text.replace("</body>", f"{IMAGE}<script>alert(1)</script></body>")
    )
    _, console = browse(tmp_path / "page.html", tmp_path / "profile")
    assert any("img-src" in line for line in console)
    assert any("script-src" in line for line in console)


def test_it_fits_loads_nothing_and_makes_pictures(page: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(probed(page))
    (tmp_path / "policy.html").write_text(probed(page, policy=True))
    (tmp_path / "image.html").write_text(probed(page, IMAGE))
    frames = [
        f'<iframe src="{name}" style="width:{width}px;height:900px;border:0"></iframe>'
        for name, width in (("page.html", 375), ("policy.html", 1440), ("image.html", 1000))
    ]
    (tmp_path / "frames.html").write_text(FRAMES + "\n".join(frames))
    shown, console = browse(tmp_path / "frames.html", tmp_path / "profile")
    said = {
        one["inner"]: one
        for one in (json.loads(text) for text in shown.shown if text.startswith('{"inner"'))
    }
    assert sorted(said) == [375, 1000, 1440], console
    assert [one for one in said[1000]["loaded"] if one.startswith("http")]  # it would be seen
    for width in (375, 1440):
        assert said[width]["scroll"] <= width
        assert not [one for one in said[width]["loaded"] if not one.startswith(("data:", "blob:"))]
        assert len(said[width]["figures"]) == 13
        for figure in said[width]["figures"]:
            assert figure["png"].startswith("data:image/png;base64,iVBOR"), figure
            assert 0 <= figure["left"] < figure["right"] <= width, figure
            assert figure["height"] >= 100, figure


def test_every_button_saves_its_figure(page: Path, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(probed(page, policy=True, probe=CLICKS))
    shown, console = browse(tmp_path / "page.html", tmp_path / "profile")
    assert not console
    (said,) = [json.loads(text)["saved"] for text in shown.shown if text.startswith('{"saved"')]
    assert sorted(name for name, *_ in said) == sorted(f"{one}.png" for one in shown.titles())
    heights = {str(a["data-figure"]): int(a["data-height"] or 0) for tag, a in shown.tags
               if "data-figure" in a}  # fmt: skip
    for name, mark, width, height in said:
        assert mark.to_bytes(4, "big") == b"PNG\r"
        assert (width, height) == (2000, 2 * max(400, heights[name.removesuffix(".png")]))
