"""An energy that was asked for and not reached is said once, when it is measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergekit_arm.calibration.calibrate import calibrate
from tests.support.calibrations import WAYS, options
from tests.support.equality import load_statistics


@pytest.mark.parametrize("low_memory", WAYS)
def test_a_missed_energy_is_said_once_with_its_remedy(
    low_memory: bool, family: Path, token_file: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    given = options(family, tmp_path / "s", token_file, rank=8, energy=0.5, low_memory=low_memory)
    calibrate(given, say=said.append)
    (note,) = [line for line in said if "--energy" in line]
    _, tensors = load_statistics(tmp_path / "s")
    held = [
        float(value.double().sum() / tensors[name.replace(".eigenvalues", ".trace")])
        for name, value in tensors.items()
        if name.endswith(".eigenvalues")
    ]
    short = [share for share in held if share < 0.5]
    assert len(short) > 0
    assert f"0.5 was not reached at {len(short)} of {len(held)} inputs" in note
    found = re.search(r"hold (0\.\d+) to (0\.\d+) of", note)
    assert found
    assert [float(text) for text in found.groups()] == pytest.approx(
        [min(short), max(short)], abs=6e-4
    )
    assert note.endswith("--rank above 8 stores more of them")


def test_nothing_is_said_of_an_energy_that_was_reached(
    family: Path, token_file: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    calibrate(options(family, tmp_path / "s", token_file, energy=1.0), say=said.append)
    # All of so few channels' directions are stored.
    assert not any("--energy" in line for line in said)
