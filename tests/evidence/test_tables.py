"""Tables say what the lines say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.evidence.hypervolume import gains
from tests.evidence.intervals import paired
from tests.evidence.plots import distances, draw
from tests.evidence.tables import PAGE, grouped, page, summary, swept
from tests.evidence.units import Line, Store
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


def test_settings_stand_beside_the_first() -> None:
    some = [line("as it is", [2.0] * 4), line("κ = 1", [1.5] * 4)]
    text = swept("a study", grouped(some))
    assert "| κ = 1 | 1 | -0.500 | 1 / 1 / 0 of 1 | +0.000 | +0.000 |" in text


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


def first_seed(study: str) -> dict[str, dict[str, Line]]:
    """Label → task or pair → its test line, of seed 0 at size small."""
    found: dict[str, dict[str, Line]] = {}
    for one in Store(study, "small").lines().values():
        _, _, about, seed, part, label = one["unit"].split("/", 5)
        if (seed, part) == ("0", "test") and about.count("+") < 2:
            found.setdefault(label, {})[about] = one
    return found


def said(begin: str) -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition(begin)[2].partition("\n")[0]


def mean(found: dict[str, dict[str, Line]], label: str, quantity: str) -> float:
    return float(np.mean([np.mean(one[quantity]) for one in found[label].values()]))


def lower(found: dict[str, dict[str, Line]], label: str, than: str) -> int:
    pairs = [(found[label][about], found[than][about]) for about in found[label]]
    return sum(np.mean(one["losses"]) < np.mean(other["losses"]) for one, other in pairs)


def test_the_front_page_says_what_the_lines_say_of_streams() -> None:
    found = first_seed("streams")
    linear, turned = "linear to early", "arm to early, general text, ρ = -0.4"
    retaining = "arm to early, task_stats, κ = 0.3"
    labels = ["base", "100 %", linear, turned, retaining]
    assert {len(found[label]) for label in labels} == {4}
    text = said("**Early checkpoints of a fine-tune")
    general = [mean(found, label, "general") for label in labels]
    assert re.findall(r"\d\.\d\d", text) == [f"{value:.2f}" for value in general]
    counts = [
        lower(found, "early", "100 %"),
        lower(found, linear, turned),
        lower(found, retaining, linear),
    ]
    assert re.findall(r"(\d) of 4", text) == [str(count) for count in counts]


def test_the_front_page_says_what_the_lines_say_of_specialists() -> None:
    found = first_seed("specialists")
    tuned, informed = "task_arithmetic", "aim_task_arithmetic"
    whole, protected = "task_arithmetic, weights 1", "aim, weights 1, ω = 0"
    assert {len(found[label]) for label in (tuned, informed, whole, protected, "regmean")} == {4}
    text = said("**Two specialists merged**")
    general = [mean(found, label, "general") for label in ("regmean", tuned)]
    assert re.findall(r"\d\.\d\d", text) == [f"{value:.2f}" for value in general]
    volumes = [
        gains(
            {label: lines[pair] for label, lines in found.items() if pair in lines}, pair.split("+")
        )
        for pair in found[tuned]
    ]
    counts = [
        lower(found, "regmean", tuned),
        lower(found, informed, tuned),
        sum(volume[informed] > volume[tuned] for volume in volumes),
        lower(found, protected, whole),
        lower(found, protected, "aim, weights 1, even"),
    ]
    assert re.findall(r"(\d) of 4", text) == [str(count) for count in counts]
