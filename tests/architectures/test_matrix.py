"""Every architecture file that mergekit ships, and ``TABLE.md``, which says what came out.

``python -m tests.architectures.test_matrix`` writes the table anew.
"""

from __future__ import annotations

import importlib.resources
import json
import tempfile
from pathlib import Path

import mergekit._data.architectures
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.architectures.matrix import run, table_line
from tests.architectures.zoo import REMOTE, ZOO, Architecture

TABLE = Path(__file__).parent / "TABLE.md"

_HEAD = """# Architectures

What `tests/architectures` found, for every architecture file that mergekit 0.1.5 ships and for some
models that it has no file for. Each is a tiny random model, calibrated, measured a second time
by a recorder that knows no module names, merged with `aim` through `mergekit-yaml`, and compared
weight by weight. *Measured* and *listed* add up to every tensor of the checkpoint.

| mergekit's file | architecture | measured | listed | result |
| --- | --- | --- | --- | --- |
"""
_REMOTE = "refused: not in transformers; its code comes with the checkpoint (`--trust-remote-code`)"


@pytest.mark.parametrize("architecture", ZOO, ids=lambda one: f"{one.id}-{one.model}")
def test_architecture(architecture: Architecture, tmp_path: Path) -> None:
    line = table_line(architecture, run(architecture, tmp_path))
    assert line in TABLE.read_text().splitlines(), f"TABLE.md is out of date, now: {line}"


def test_the_table_has_every_file_of_mergekit() -> None:
    files = _files()
    assert {one.file for one in ZOO if one.file} | set(REMOTE) == set(files)
    lines = TABLE.read_text().removeprefix(_HEAD).splitlines()
    assert len(lines) == len(ZOO) + len(REMOTE)
    assert [line for line in lines if _REMOTE in line] == _remote_lines()
    works = {one.file for one in ZOO if one.file and not one.refused}
    assert len(works) >= 45


@pytest.mark.parametrize("file", REMOTE)
def test_what_is_called_remote_is_not_in_transformers(file: str) -> None:
    assert _files()[file]["model_type"] not in CONFIG_MAPPING
    assert REMOTE[file] in _files()[file]["architectures"]


def _files() -> dict[str, dict[str, object]]:
    folder = importlib.resources.files(mergekit._data.architectures)
    return {
        entry.name.removesuffix(".json"): json.loads(entry.read_text())
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    }


def _remote_lines() -> list[str]:
    return [f"| `{file}` | `{name}` | – | – | {_REMOTE} |" for file, name in REMOTE.items()]


def write_table() -> None:
    """Run everything and write ``TABLE.md``."""
    lines = []
    for architecture in ZOO:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(table_line(architecture, run(architecture, Path(folder))))
    TABLE.write_text(_HEAD + "\n".join([*lines, *_remote_lines()]) + "\n")


if __name__ == "__main__":
    write_table()
