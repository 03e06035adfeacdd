"""Tables say what the lines say."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from tests.evidence.differences import apart
from tests.evidence.front import README, put
from tests.evidence.intervals import paired
from tests.evidence.plots import distances, draw
from tests.evidence.tables import PAGE, front_page, grouped, page, summary, swept
from tests.evidence.units import Line, Store


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


def runs(study: str) -> dict[str, dict[str, Line]]:
    """Run, or pair and seed → label → its test line, at size small."""
    found = grouped(Store(study, "small").lines().values())
    return {name: group for name, group in found.items() if name.count("+") < 2}


def of_study(study: str, label: str, reference: str, quantity: str = "losses") -> list[float]:
    return apart(runs(study), label, reference, quantity)


def test_the_front_page_has_the_tables_of_the_lines() -> None:
    text = README.read_text(encoding="utf-8")
    assert text == put(front_page()), "run python -m tests.evidence.tables"


def test_the_front_page_says_what_the_lines_say_of_streams() -> None:
    turned = "arm to late, leading direction alone, ρ = -1.0"
    random = "arm to late, random, ρ = -0.7"
    linear, converged = "linear to late", "100 %"

    def mean(label: str, reference: str, quantity: str = "losses") -> float:
        found = of_study("streams", label, reference, quantity)
        assert len(found) >= 5
        return fmean(found)

    # "A merge passes a converged model that has overfitted"
    for label in ("linear to early", linear, turned):
        assert mean(label, converged) < -0.1
    # "so does stopping early, which forgets more"
    assert mean("best checkpoint", converged) < -0.1
    assert mean("best checkpoint", linear, "general") > 0.02
    # "neither better nor worse than the linear merge, but it forgets a quarter as much"
    assert abs(mean(turned, linear)) < 0.01
    assert mean(turned, linear, "exact") > -0.01
    forgets = {label: mean(label, "base", "general") for label in (turned, linear)}
    assert forgets[turned] == pytest.approx(forgets[linear] / 4, abs=forgets[linear] / 20)
    # "which a random subspace does not"
    assert mean(random, converged, "general") > 0.5 * mean("base", converged, "general")


def test_the_front_page_says_what_the_lines_say_of_specialists() -> None:
    tuned, informed, retaining = (
        "task_arithmetic",
        "aim_task_arithmetic, weights from 0.4",
        "regmean, κ = 1",
    )

    def mean(label: str, reference: str = tuned, quantity: str = "losses") -> float:
        found = of_study("specialists", label, reference, quantity)
        assert len(found) >= 4
        return fmean(found)

    # "on specialists it does the same"
    assert abs(mean("arm")) < 0.01
    forgets = {label: mean(label, "base", "general") for label in ("arm", tuned)}
    assert forgets["arm"] == pytest.approx(forgets[tuned] / 4, abs=forgets[tuned] / 20)
    # "RegMean is better than tuned task arithmetic"
    assert mean("regmean") < -0.05
    assert mean("regmean", quantity="general") < -0.05
    # "even with the directions of second moments guessed from task vectors"
    assert mean("regmean, no data") < -0.03
    # "with retain: 1 forgets next to nothing"
    assert mean(retaining) < -0.05
    assert mean(retaining, "regmean") < 0.02
    assert mean(retaining, "base", "general") < 0.03
    # "AIM is little better"
    assert -0.03 < mean(informed) < 0
    assert mean(informed, quantity="general") < 0
    text = README.read_text(encoding="utf-8").partition("At weights of 1")[2].partition("\n")[0]
    whole = [
        of_study("specialists", "aim, weights 1, ω = 0", than)
        for than in ("task_arithmetic, weights 1", "aim, weights 1, even")
    ]
    counts = [(sum(one < 0 for one in found), len(found)) for found in whole]
    assert re.findall(r"(\d+) of (\d+)", text) == [(str(a), str(b)) for a, b in counts]
