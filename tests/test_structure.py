"""The package's rooms: what may import what, how long a file is, and what a wheel carries.

Tests use what is public.

The files are read, not imported, so that an import which never runs counts as well.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from tests.support.paths import PACKAGE, ROOT

FLOORS = (
    {"__init__", "errors", "units", "autoload"},
    {"files", "machine", "outputs", "sections", "tensors"},
    {"data", "models", "statistics"},
    {"methods", "calibration"},
    {"judging", "merging"},
    {"streaming"},
    {"tuning"},
    {"checking", "inspecting", "publishing"},
    {"imatrix", "reporting"},
    {"demo"},
    {"cli"},
    {"__main__"},
)
"""Rooms from the ground up. A room imports from its own and lower floors."""

NEIGHBOURS = {"models": {"data", "statistics"}, "data": {"statistics"}}
"""Rooms that may import from others of their floor, where it has rooms and not just files."""

UPWARDS = {("autoload", "methods"), ("autoload", "publishing")}
"""The imports upwards: what runs at every start of Python waits for mergekit, then registers."""


@dataclass(frozen=True)
class Import:
    """One import of a module of this package or of another."""

    file: Path
    line: int
    target: str
    runs: bool
    """Not only for type checkers."""
    inside: bool
    """In a function."""

    @property
    def where(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.target}"


FILES = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def room(module: str) -> str:
    """The folder or file directly under the package that holds ``module``."""
    return [*module.split("."), "__init__"][1]


def imports_of(path: Path, node: ast.AST, runs: bool = True, inside: bool = False) -> list[Import]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            targets = [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{path}:{child.lineno}: a relative import"
            # A name imported from a package is a module of it, or stands in its __init__.
            names = [f"{child.module}.{alias.name}" for alias in child.names]
            targets = sorted({name if name in MODULES else str(child.module) for name in names})
        else:
            unchecked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            found += imports_of(path, child, runs and not unchecked, inside or function)
            continue
        found += [Import(path, child.lineno, target, runs, inside) for target in targets]
    return found


IMPORTS = [one for path, text in FILES.items() for one in imports_of(path, ast.parse(text))]
OURS = [one for one in IMPORTS if one.target in MODULES]


def test_every_room_has_a_floor() -> None:
    homeless = {room(module) for module in MODULES}.difference(*FLOORS)
    assert not homeless, f"give these rooms a floor: {homeless}"


def test_no_import_runs_upwards() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = []
    for one in OURS:
        source, target = room(module_name(one.file)), room(one.target)
        if one.file == PACKAGE / "__init__.py" and not one.runs:
            continue  # what the package offers from all floors, for type checkers
        if not {source, target} <= floor.keys():
            continue  # the test before this one names it
        beside = floor[source] == floor[target] and source != target
        rooms = (PACKAGE / source).is_dir() and (PACKAGE / target).is_dir()
        forbidden = beside and rooms and target not in NEIGHBOURS.get(source, ())
        if (floor[target] > floor[source] or forbidden) and (source, target) not in UPWARDS:
            wrong.append(one.where)
    assert not wrong, "imports from a higher floor or a neighbour:\n" + "\n".join(wrong)


def test_no_import_runs_in_a_circle() -> None:
    graph = defaultdict(set)
    for one in OURS:
        if one.runs and not one.inside:
            graph[module_name(one.file)].add(one.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("modules import each other: " + " ← ".join(error.args[1]))


IMPORTING = re.compile(r"\s+(import|from) ")


def test_imports_inside_functions_say_why() -> None:
    def explained(one: Import) -> bool:
        lines = FILES[one.file].splitlines()
        number = one.line - 1
        while number and (not lines[number - 1] or IMPORTING.match(lines[number - 1])):
            if "#" in lines[number]:
                return True
            number -= 1  # one comment speaks for the imports that follow it
        return "#" in lines[number] or lines[number - 1].lstrip().startswith("#")

    silent = [one.where for one in IMPORTS if one.inside and one.runs and not explained(one)]
    assert not silent, "imports inside functions without a comment:\n" + "\n".join(silent)


def test_public_classes_have_names_of_their_own() -> None:
    where = defaultdict(list)
    for module, path in MODULES.items():
        for node in ast.parse(FILES[path]).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(module)
    twice = {name: modules for name, modules in where.items() if len(modules) > 1}
    assert not twice, f"one name for two classes: {twice}"


def test_the_wheel_holds_the_package_and_what_starts_it() -> None:
    builder = WheelBuilder(str(ROOT))
    files = {Path(one.distribution_path) for one in builder.recurse_included_files()}
    starters = set(PACKAGE.glob("mergekit_arm.*"))
    assert starters, "nothing starts the package"
    package = {path for path in PACKAGE.rglob("*") if path.is_file()} - starters
    expected = {p.relative_to(ROOT) for p in package if "__pycache__" not in p.parts}
    at_the_root = {Path(path.name) for path in starters}
    assert files - at_the_root == expected
    assert set(map(Path, builder.config.get_force_include().values())) == at_the_root


def test_no_file_is_longer_than_300_lines() -> None:
    lines = {str(path.relative_to(ROOT)): text.count("\n") for path, text in FILES.items()}
    long = {name: count for name, count in lines.items() if count > 300}
    assert not long, f"split these by what they do: {long}"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def uses_of_private_names(tree: ast.Module) -> list[tuple[int, str]]:
    """Private names that a test imports from the package, reads from it, or patches."""
    ours: set[str] = set()
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            ours |= {alias.asname or alias.name for alias in node.names}
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            mine = [alias for alias in node.names if alias.name.startswith(PACKAGE.name)]
            ours |= {alias.asname or PACKAGE.name for alias in mine}
            names = [part for alias in mine for part in alias.name.split(".")]
        else:
            continue
        found += [(node.lineno, name) for name in names if private(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr):
            root: ast.expr = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in ours:
                found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("setattr"):
            owner, *names = [ast.unparse(one).strip("'\"") for one in node.args[:2]]
            if owner.split(".")[0] in {PACKAGE.name, *ours}:
                parts = [*owner.split("."), *names]
                found += [(node.lineno, part) for part in parts if private(part)]
    return found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("from mergekit_arm.units import _parse", ["_parse"]),
        ("import mergekit_arm.units as u\nu._parse()", ["_parse"]),
        ("from mergekit_arm import units\nunits.a._parse()", ["_parse"]),
        ("from mergekit_arm import units\nm.setattr(units, '_parse', None)", ["_parse"]),
        ("monkeypatch.setattr(mergekit.registry, '_METHODS', None)", []),
        ("monkeypatch.setattr('mergekit_arm.units._parse', None)", ["_parse"]),
        ("from mergekit_arm import units\nunits.__name__, self._own, torch._C", []),
    ],
)
def test_uses_of_private_names_are_found(line: str, expected: list[str]) -> None:
    assert [name for _, name in uses_of_private_names(ast.parse(line))] == expected


def test_tests_use_what_is_public() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for line, name in uses_of_private_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not wrong, "private names in tests:\n" + "\n".join(wrong)


def defined_here(trees: list[ast.Module]) -> set[str]:
    """Every private name that the package itself gives to something."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if private(name)}


def test_private_names_of_libraries_are_listed() -> None:
    trees = [ast.parse(text) for text in FILES.values()]
    ours = defined_here(trees)
    used = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in ours:
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            used |= {name for name in names if private(name) and name not in ours}
    text = (PACKAGE / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Names of other libraries")[2].partition("\n## ")[0]
    missing = sorted(name for name in used if not re.search(rf"\b{name}\b", table))
    assert len(used) > 5
    assert not missing, f"add to the table in mergekit_arm/README.md: {missing}"
