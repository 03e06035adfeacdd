"""The oldest packages that are tested with are the oldest that pyproject.toml admits."""

from __future__ import annotations

import re

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.paths import ROOT

tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on


def pins(*path: str) -> dict[str, Version]:
    """Return every package that a file of requirements pins, with its version."""
    text = ROOT.joinpath(*path).read_text(encoding="utf-8")
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in found}


def project() -> dict[str, list[str]]:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return content["project"]


def test_the_oldest_are_the_lower_bounds() -> None:
    bounds = {}
    for line in project()["dependencies"]:
        requirement = Requirement(line)
        (lower,) = (s.version for s in requirement.specifier if s.operator == ">=")
        bounds[canonicalize_name(requirement.name)] = Version(lower)
    oldest = pins("tests", "oldest.txt")
    assert bounds == {name: oldest.get(name) for name in bounds}


@pytest.mark.parametrize("path", [("constraints.txt",), ("tests", "oldest.txt")])
def test_every_pin_is_admitted(path: tuple[str, ...]) -> None:
    pinned = pins(*path)
    for line in project()["dependencies"]:
        requirement = Requirement(line)
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, line
