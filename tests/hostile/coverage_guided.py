"""Fuzzing that follows new code: ``python -m tests.hostile.coverage_guided NAME CORPUS [-x=y]``.

Not for import: atheris instruments what is imported after it, and its ``Fuzz`` ends the process.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris
import click

with atheris.instrument_imports(include=["mergekit_arm"], enable_loader_override=False):
    from mergekit_arm.checking.document import read_documents
    from mergekit_arm.imatrix.files import read_imatrix
    from mergekit_arm.statistics.read import Statistics
    from mergekit_arm.streaming.config import load_config
    from mergekit_arm.tuning.config import load_tuning


def statistics(file: Path) -> None:
    opened = Statistics("stats", file.parent)
    for name in opened.names:
        opened.stored(name)


TARGETS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "metadata": ("activation_stats.json", statistics),
    "tensors": ("model.safetensors", statistics),
    "imatrix": ("x.gguf", read_imatrix),
    "imatrix-dat": ("x.dat", read_imatrix),
    "stream": ("c.yml", load_config),
    "tune": ("c.yml", load_tuning),
    "merge": ("c.yml", read_documents),
}
"""The file that is damaged, and what reads it."""


def main() -> None:
    name, corpus, *options = sys.argv[1:]
    file_name, read = TARGETS[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / file_name
        for other in Path(corpus).glob("beside/*"):
            (Path(folder) / other.name).write_bytes(other.read_bytes())

        def one(content: bytes) -> None:
            file.write_bytes(content)
            said = "nothing"
            try:
                read(file)
            except click.ClickException as error:
                said = error.message
            assert said.isprintable(), said

        atheris.Setup([sys.argv[0], f"{corpus}/inputs", *options], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
