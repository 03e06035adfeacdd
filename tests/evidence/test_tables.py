"""Tables say what the lines say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.evidence.intervals import paired
from tests.evidence.plots import distances, draw
from tests.evidence.tables import PAGE, grouped, page, summary
from tests.evidence.units import RESULTS, Line
from tests.support.paths import ROOT


def line(label: str, losses: list[float], *, about: str = "reverse", data: str = "d") -> Line:
    return {
        "unit": f"streams/small/{about}/0/test/{label}",
        "data": data,
        "losses": losses,
        "exact": "01" * (len(losses) // 2),
        "general": [3.0, 4.0],
    }


def test_the_page_is_what_the_lines_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.evidence.tables"


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = paired(generator.normal(0.3, 1, 200).tolist(), [0.0] * 200)
        covered += found.low <= 0.3 <= found.high
    assert 180 <= covered <= 199  # 95 % of 200, within three standard deviations


def test_pairing_takes_out_what_examples_share() -> None:
    hard = np.random.default_rng(0).exponential(5, 200)
    found = paired((hard + 0.1).tolist(), hard.tolist())
    assert found.sure
    assert found.low == pytest.approx(0.1)
    with pytest.raises(ValueError, match="cannot be paired"):
        paired([1.0], [1.0, 2.0])


def test_a_summary_counts_runs() -> None:
    groups = grouped(
        one
        for about, gain in (("reverse", -1.0), ("add", 1.0), ("sort", -1.0))
        for one in (
            line("100 %", [2.0] * 10, about=about),
            line("linear to early", [2.0 + gain] * 10, about=about),
        )
    )
    rows = summary("streams", groups).splitlines()
    (row,) = (one for one in rows if one.startswith("| linear"))
    assert "2 / 2 / 1 of 3" in row
    assert "-0.333 ± 1.155" in row


def test_lines_of_different_data_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different data"):
        grouped([line("100 %", [1.0, 2.0]), line("base", [1.0, 2.0], data="other")])


def test_a_picture_is_drawn_of_distances(tmp_path: Path) -> None:
    groups = grouped([line("100 %", [2.0] * 4), line("early", [1.0] * 4), line("base", [9.0] * 4)])
    assert distances(groups, "100 %") == {"100 %": [(0.0, 0.0)], "early": [(0.0, -1.0)]}
    draw("a study", groups, "100 %", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_without_lines_there_is_a_page(tmp_path: Path) -> None:
    assert page(tmp_path).startswith("# Results")


def test_the_front_page_says_what_the_lines_say() -> None:
    lines = [json.loads(one) for one in (RESULTS / "streams-small.jsonl").read_text().splitlines()]
    found: dict[str, dict[str, Line]] = {}
    for one in lines:
        _, _, task, seed, part, label = one["unit"].split("/", 5)
        if (seed, part) == ("0", "test"):
            found.setdefault(label, {})[task] = one
    assert {len(tasks) for tasks in found.values()} == {4}

    def loss(label: str, task: str) -> float:
        return float(np.mean(found[label][task]["losses"]))

    def lower(label: str, than: str) -> int:
        return sum(loss(label, task) < loss(than, task) for task in found[label])

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    said = text.partition("**Early checkpoints of a fine-tune")[2].partition("\n")[0]
    linear, turned = "linear to early", "arm to early, general text, ρ = -0.4"
    retaining = "arm to early, task_stats, κ = 0.3"
    labels = ["base", "100 %", linear, turned, retaining]
    general = [float(np.mean([one["general"] for one in found[la].values()])) for la in labels]
    assert re.findall(r"\d\.\d\d", said) == [f"{value:.2f}" for value in general]
    counts = [lower("early", "100 %"), lower(linear, turned), lower(retaining, linear)]
    assert re.findall(r"(\d) of 4", said) == [str(count) for count in counts]
