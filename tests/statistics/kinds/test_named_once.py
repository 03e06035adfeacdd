"""Nothing but the kinds themselves, and the methods that need them, names a kind or its tensors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from mergekit_arm.statistics.kinds import kinds
from tests.support.paths import PACKAGE

FREE = {
    "statistics/kinds": "where they are declared",
    "statistics/format.py": "the schema keeps the fields that format 1 began with",
    "methods": "`importance` is a parameter of aim",
    "imatrix": "llama.cpp's files hold importance, and nothing else",
    "inspecting": "it says in words what the numbers of each kind mean",
    "cli/tables/inspect.py": "and shows it",
    "reporting": "and so does this, as figures",
    "tuning/report/plot.py": "`optuna.importance`, of parameters",
}


def names() -> set[str]:
    """Every kind, every tensor of one, and what the records of sites call them."""
    found = {"no_subspace", "sketch_matrix"}
    for kind in kinds():
        configured = kind.adding_up()
        found |= {kind.name, *configured.state(64), *configured.stored(64)}
    # Also an option of `calibrate`, which sets the size of every kind's sample.
    return found - {"subspace_tokens"}


def named(path: Path) -> set[str]:
    """Return the strings and attributes of a module that are such names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value.strip("."))
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
    return found & names()


def modules() -> list[Path]:
    """Every module of the package that has no leave to name a kind."""
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if not str(path.relative_to(PACKAGE)).startswith(tuple(FREE))
    ]


def test_there_are_names_to_look_for() -> None:
    assert names() >= {"importance", "abs_sum", "subspace", "basis", "eigenvalues", "sketch"}
    assert named(PACKAGE / "statistics/kinds/subspace.py") >= {"subspace", "basis", "no_subspace"}
    assert len(modules()) > 80


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_names_no_kind(path: Path) -> None:
    assert named(path) == set()


def test_only_the_list_of_kinds_imports_them_all() -> None:
    """Others that need one say so by importing it: methods, what runs them, what shows a kind."""
    importers = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for kind in kinds()
        if f"kinds.{kind.name}" in path.read_text()
    }
    rooms = {name.split("/")[0] for name in importers - {"statistics/kinds/__init__.py"}}
    assert rooms <= {"methods", "streaming", "imatrix", "inspecting", "reporting"}
