"""Damaged files and documents by the thousand: a refusal of ours or a result, and nothing else.

Good files are damaged by flipped bits, cuts, splices and zeros; good documents by other values in
some of their places. Whatever comes of it is read within a second and within 500 MB. Hypothesis
chooses a hundred or so of each, and makes them small where something breaks. That takes longer than
to read, so that more are chosen by a number each: ten thousand all together, and a million under
``-m long``.
"""

from __future__ import annotations

import json
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import click
import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings

from mergekit_arm.checking.document import read_documents
from mergekit_arm.data.formats import Unusable
from mergekit_arm.data.masks import read_ids
from mergekit_arm.errors import InputError
from mergekit_arm.imatrix.files import read_imatrix
from mergekit_arm.statistics.read import Statistics
from mergekit_arm.streaming.config import load_config
from mergekit_arm.tuning.config import load_tuning
from tests.hostile.damage import (
    CHANGES,
    DAMAGE,
    Change,
    Choice,
    Wrong,
    changed,
    damaged,
    one_of,
)
from tests.imatrix.test_imatrix import sums, write_dat, write_gguf
from tests.support.paths import EXAMPLES

SECOND, MEMORY = 1.0, 500_000_000


def within_limits(read: Callable[[], object]) -> None:
    """Read what may be damaged. The time is this process's own: others may have the cores."""
    before, begun, said = peak(), time.process_time(), "nothing"
    previous = signal.signal(signal.SIGPROF, hangs)
    signal.setitimer(signal.ITIMER_PROF, 5 * SECOND)
    try:
        read()
    except click.ClickException as error:
        said = error.message
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
    assert said
    assert said.isprintable(), said
    assert time.process_time() - begun < SECOND
    assert peak() - before < MEMORY


def hangs(*_: object) -> None:
    """End what would go on for ever, and be judged by nothing."""
    raise AssertionError("it does not end")


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


AMOUNTS = [0, 910, pytest.param(91_000, marks=pytest.mark.long)]
"""Of each of eleven targets; 0 leaves it to hypothesis."""


def try_each(amount: int, some: int, choice: Choice, check: Callable[[Any], None]) -> None:
    """Check that many inputs, or the ``some`` that hypothesis draws; the same ones in every run."""
    drawn, numbered = choice
    if not amount:
        chosen = settings(
            max_examples=some, deadline=None, database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )  # fmt: skip
        seed(1)(chosen(given(drawn)(check)))()
        return
    for number in range(amount):
        given_input = numbered(Random(number))
        try:
            check(given_input)
        except BaseException:
            print(f"input {number}: {given_input!r}")  # noqa: T201  for whoever mends it
            raise


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("file", ["activation_stats.json", "model.safetensors"])
def test_statistics(file: str, amount: int, family: Path, in_memory: Path) -> None:
    for one in (family / "stats").iterdir():
        (in_memory / one.name).write_bytes(one.read_bytes())
    whole = (in_memory / file).read_bytes()

    def read() -> None:
        opened = Statistics("stats", in_memory)
        for name in opened.names:
            opened.stored(name)

    def check(steps: list[Wrong]) -> None:
        (in_memory / file).write_bytes(damaged(whole, steps))
        within_limits(read)

    try_each(amount, 100, DAMAGE, check)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_metadata(amount: int, family: Path, in_memory: Path) -> None:
    """Well-formed JSON without a digest: what only the schema and the checks can refuse."""
    for one in (family / "stats").iterdir():
        (in_memory / one.name).write_bytes(one.read_bytes())
    whole = json.loads((in_memory / "activation_stats.json").read_text())
    whole.pop("digest"), whole.pop("digests")

    def read() -> None:
        opened = Statistics("stats", in_memory)
        opened.metadata.experts()
        for name in opened.names:
            opened.stored(name)

    def check(steps: list[Change]) -> None:
        text = json.dumps(changed(whole, steps), default=str)
        (in_memory / "activation_stats.json").write_text(text)
        within_limits(read)

    try_each(amount, 100, CHANGES, check)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("kind", ["gguf", "dat"])
def test_importance_matrices(kind: str, amount: int, in_memory: Path) -> None:
    file = in_memory / "x.imatrix"
    if kind == "gguf":
        write_gguf(file, sums(magnitudes=True))
    else:
        values = {name.removesuffix(".in_sum2"): (one[0], 3) for name, one in sums().items()}
        write_dat(file, values)
    whole = file.read_bytes()

    def check(steps: list[Wrong]) -> None:
        file.write_bytes(damaged(whole, steps))
        within_limits(lambda: read_imatrix(file))

    try_each(amount, 100, DAMAGE, check)


READERS: dict[str, tuple[Callable[[Path], object], list[Path]]] = {
    "stream": (load_config, sorted(EXAMPLES.glob("stream*.yml"))),
    "tune": (load_tuning, sorted(EXAMPLES.glob("tune*.yml"))),
    "merge": (read_documents, sorted(EXAMPLES.glob("*.yml"))),
}


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("kind", READERS)
def test_text_of_yaml(kind: str, amount: int, in_memory: Path) -> None:
    """Bytes of the examples, damaged: mostly no YAML any more."""
    read, files = READERS[kind]
    assert files
    texts = [file.read_bytes() for file in files]
    target = in_memory / "c.yml"

    def check(given_input: tuple[bytes, list[Wrong]]) -> None:
        target.write_bytes(damaged(*given_input))
        within_limits(lambda: read(target))

    try_each(amount, 100, one_of(texts, DAMAGE), check)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("kind", ["stream", "tune"])
def test_documents(kind: str, amount: int) -> None:
    """The examples with other values in them: YAML still, but not what was meant."""
    read, files = READERS[kind]
    documents = [yaml.safe_load(file.read_text()) for file in files]

    def check(given_input: tuple[Any, list[Change]]) -> None:
        document = changed(*given_input)
        if isinstance(document, dict):
            within_limits(lambda: read(document))  # type: ignore[arg-type]

    try_each(amount, 250, one_of(documents, CHANGES), check)


@pytest.mark.parametrize("amount", AMOUNTS)
def test_rows_of_token_ids(amount: int) -> None:
    good = {
        "input_ids": [1, 2, 3], "attention_mask": [1, 1, 0], "token_type_ids": [0, 0, 1],
        "decoder_input_ids": [1, 2], "decoder_attention_mask": [1, 1], "pixel_values": [[0.5]],
    }  # fmt: skip

    def read(row: Any) -> None:
        try:
            read_ids(row, "input_ids")
        except Unusable as reason:
            raise InputError(str(reason)) from reason

    def check(steps: list[Change]) -> None:
        row = changed(good, steps)
        if isinstance(row, dict) and "input_ids" in row:
            within_limits(lambda: read(row))

    try_each(amount, 250, CHANGES, check)
