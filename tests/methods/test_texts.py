"""The methods' texts say what the code does: names, scopes, defaults and ranges of parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from mergekit import merge_methods

from mergekit_arm.methods.parameters import Interval, range_of
from tests.support.paths import PACKAGE, ROOT

TEXTS = {name: PACKAGE / "methods" / f"{name.upper()}.md" for name in ("aim", "arm", "regmean")}
STATISTICS = {"activation_stats": "required", "task_stats": "none", "measured_on": "none"}
SCOPES = {"shared": "shared", "each model": "input", "each other model": "non_base"}


def rows(text: str) -> dict[str, list[str]]:
    """The table of parameters: by name, its scope, default and range."""
    section = text.split("## Parameters")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): rest for name, *rest in cells}


def own_parameters(method: str) -> dict[str, Any]:
    specs = {one.name: one for one in merge_methods.get(method).spec.parameters}
    if method == "aim":
        for one in merge_methods.get("task_arithmetic").spec.parameters:
            del specs[one.name]
    return specs


@pytest.mark.parametrize("method", TEXTS)
def test_the_table_of_parameters(method: str) -> None:
    table, specs = rows(TEXTS[method].read_text()), own_parameters(method)
    assert set(table) == set(specs)
    for name, (scope, default, values) in table.items():
        spec, allowed = specs[name], range_of(specs[name])
        assert SCOPES[scope] == spec.scope.value, name
        if isinstance(allowed, Interval):
            assert float(default) == spec.default, name
            assert values == str(allowed), name
        elif allowed is not None:
            assert default == f"`{spec.default}`", name
            assert values == " or ".join(f"`{one}`" for one in allowed), name
        else:
            assert (default, spec.default) == (STATISTICS[name], None)


@pytest.mark.parametrize("method", TEXTS)
def test_files_that_are_named_exist(method: str) -> None:
    named = re.findall(r"`(tests/[^`]+\.py)`", TEXTS[method].read_text())
    assert named
    assert all((ROOT / Path(one)).is_file() for one in named)


def test_methods_that_are_named_exist() -> None:
    known = {one.spec.name for one in merge_methods.registered_methods()}
    for text in TEXTS.values():
        named = set(re.findall(r"`(aim_[a-z_]+)`", text.read_text()))
        assert named <= known


def test_an_interval_is_what_it_says() -> None:
    closed, open_low = Interval(0, 1), Interval(0, 2, open_low=True)
    assert [str(closed), str(open_low)] == ["[0, 1]", "(0, 2]"]
    assert 0 in closed
    assert 0 not in open_low
    assert 2 in open_low
    assert float("nan") not in closed
