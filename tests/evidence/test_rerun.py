"""A stored unit of each study, done again: the number is within its interval."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean, stdev

import pytest

pytest.importorskip("reasoning_gym", reason="pip install -e '.[evidence]'")

from tests.evidence import specialists, streams
from tests.evidence.runs import Base
from tests.evidence.sizes import SIZES
from tests.evidence.units import Line, Store, Unit
from tests.real.smollm2 import Unavailable, smollm2

pytestmark = pytest.mark.long
STUDIES = {"streams": streams.units, "specialists": specialists.units}


def stored(study: str) -> tuple[str, Line]:
    """A merge that was judged on the test split: its size and its line."""
    for size in SIZES:
        for line in Store(study, size).lines().values():
            if "/test/" in line["unit"] and "settings" in line:
                return size, line
    pytest.skip(f"no results of {study} yet")


@pytest.mark.parametrize("study", list(STUDIES))
def test_the_number_comes_out_again(study: str, tmp_path: Path) -> None:
    size, line = stored(study)
    try:
        smollm2()
    except Unavailable as error:
        pytest.skip(str(error))
    store = Store(study, size, tmp_path / "lines")
    # The settings are given: what they were chosen from is not done again.
    for text, known in Store(study, size).lines().items():
        if "/validation/" in text:
            store.append(known)
    units: list[Unit] = STUDIES[study](Base(SIZES[size], tmp_path), store)
    (unit,) = (one for one in units if str(one.key) == line["unit"])
    again = store.run(unit)
    assert again["data"] == line["data"], "another Python or reasoning-gym: other text"
    for quantity in ("losses", "general"):
        known = line[quantity]
        error = stdev(known) / len(known) ** 0.5
        assert fmean(again[quantity]) == pytest.approx(fmean(known), abs=2 * error), quantity
