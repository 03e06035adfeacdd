"""Damaged files and documents by the thousand: a refusal of ours or a result, and nothing else.

Good files are damaged by flipped bits, cuts, splices and zeros; good documents by other values in
some of their places. Whatever comes of it is read within a second and within 500 MB. How many: a
hundred or so of each by default, ``FUZZ_INPUTS`` of each under ``-m long`` (10,000 unless set).
"""

from __future__ import annotations

import copy
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mergekit_arm.checking.document import read_documents
from mergekit_arm.data.formats import Unusable
from mergekit_arm.data.masks import read_ids
from mergekit_arm.errors import InputError
from mergekit_arm.imatrix.files import read_imatrix
from mergekit_arm.statistics.read import Statistics
from mergekit_arm.streaming.config import load_config
from mergekit_arm.tuning.config import load_tuning
from tests.imatrix.test_imatrix import sums, write_dat, write_gguf
from tests.support.paths import EXAMPLES

LONG = int(os.environ.get("FUZZ_INPUTS", "10000"))
SECOND, MEMORY = 1.0, 500_000_000

Damage = Callable[[bytes], bytes]


def within_limits(read: Callable[[], object]) -> None:
    """Read what may be damaged. The time is this process's own: others may have the cores."""
    before, begun, said = peak(), time.process_time(), "nothing"
    try:
        read()
    except click.ClickException as error:
        said = error.message
    assert said
    assert said.isprintable(), said
    assert time.process_time() - begun < SECOND
    assert peak() - before < MEMORY


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@st.composite
def damages(draw: st.DrawFn) -> Damage:
    """One to four of the ways in which files are damaged, at places that shrink."""
    steps = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["flip", "cut", "zero", "splice", "insert", "number"]),
                st.floats(0, 1, exclude_max=True),
                st.floats(0, 1, exclude_max=True),
                st.binary(min_size=1, max_size=16),
            ),
            min_size=1,
            max_size=4,
        )
    )

    def damage(content: bytes) -> bytes:
        found = bytearray(content)
        for way, first, second, data in steps:
            # Headers are where damage does most.
            size = min(len(found), 4096) if data[0] % 2 else len(found)
            place, other = int(first * size), int(second * len(found))
            if way == "flip" and found:
                found[place] ^= 1 << data[0] % 8
            elif way == "cut":
                del found[place:]
            elif way == "zero":
                found[place : place + 16] = bytes(len(found[place : place + 16]))
            elif way == "splice":
                found[place : place + 64] = found[other : other + 64]
            elif way == "insert":
                found[place:place] = data
            elif way == "number":  # a length, as it may be the worst
                found[place : place + 8] = b"\xff\xff\xff\xff\xff\xff\xff\x7f"[: 1 + data[0] % 8]
        return bytes(found)

    return damage


WORST: list[Any] = [
    None, True, 0, -1, 7, 10**30, 10**400, 1.5, float("nan"), float("inf"), -0.0, "", "x", "a+b+c",
    "a@b@c", "../..", "\x00", "\n", "nan", "1e999", [], [[]], [None], [0.5, "x"], {}, {"x": 1},
    {None: None}, {1: 2}, {"tune": [0, 1]}, {"tune": [0, 10**400]}, {"tune": "x"}, {"value": 1},
    [{"filter": "x", "value": 1}], [{"value": {}}], {"schedule": "cosine", "peak": 1},
    {"search": [1]}, {"runs": []}, {"dataset": "x"}, {"evaluation": {"x": {"dataset": 1}}},
]  # fmt: skip


@st.composite
def replacements(draw: st.DrawFn) -> Callable[[Any], Any]:
    """Put other values into one to three places of a document, or another key, or take one out."""
    steps = draw(
        st.lists(
            st.tuples(
                st.integers(0, 10**6), st.sampled_from(["put", "remove", "rename", "swap"]),
                st.sampled_from(WORST) | st.text(max_size=8) | st.floats() | st.integers(),
                st.integers(0, 10**6),
            ),
            min_size=1, max_size=3,
        )
    )  # fmt: skip

    def change(document: Any) -> Any:
        document = copy.deepcopy(document)
        for number, way, value, other in steps:
            places = list(places_in(document))
            if not places:
                return value
            holder, key = places[number % len(places)]
            if way == "put":
                holder[key] = copy.deepcopy(value)
            elif way == "remove":
                del holder[key]
            elif way == "rename" and isinstance(holder, dict):
                holder[str(value)[:20]] = holder.pop(key)
            elif way == "swap":
                second, name = places[other % len(places)]
                holder[key] = copy.deepcopy(second[name])
        return document

    return change


def places_in(node: Any) -> Any:
    if isinstance(node, dict | list):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from places_in(node[key])


def inputs(count: int) -> Callable[[Any], Any]:
    """Give so many, the same ones in every run."""
    chosen = settings(
        max_examples=count, deadline=None, database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )  # fmt: skip
    return lambda test: seed(1)(chosen(test))


AMOUNTS = [pytest.param("some"), pytest.param("many", marks=pytest.mark.long)]


def each(amount: str, some: int) -> Callable[[Any], Any]:
    return inputs(some if amount == "some" else LONG)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("file", ["activation_stats.json", "model.safetensors"])
def test_statistics(file: str, amount: str, family: Path, tmp_path: Path) -> None:
    for one in (family / "stats").iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    whole = (tmp_path / file).read_bytes()

    def read() -> None:
        opened = Statistics("stats", tmp_path)
        for name in opened.names:
            opened.stored(name)

    @each(amount, 100)
    @given(damages())
    def check(damage: Damage) -> None:
        (tmp_path / file).write_bytes(damage(whole))
        within_limits(read)

    check()


@pytest.mark.parametrize("amount", AMOUNTS)
def test_metadata(amount: str, family: Path, tmp_path: Path) -> None:
    """Well-formed JSON without a digest: what only the schema and the checks can refuse."""
    for one in (family / "stats").iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    whole = json.loads((tmp_path / "activation_stats.json").read_text())
    whole.pop("digest"), whole.pop("digests")

    def read() -> None:
        opened = Statistics("stats", tmp_path)
        opened.metadata.experts()
        for name in opened.names:
            opened.stored(name)

    @each(amount, 100)
    @given(replacements())
    def check(change: Callable[[Any], Any]) -> None:
        text = json.dumps(change(whole), default=str)
        (tmp_path / "activation_stats.json").write_text(text)
        within_limits(read)

    check()


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("kind", ["gguf", "dat"])
def test_importance_matrices(kind: str, amount: str, tmp_path: Path) -> None:
    file = tmp_path / "x.imatrix"
    if kind == "gguf":
        write_gguf(file, sums(magnitudes=True))
    else:
        values = {name.removesuffix(".in_sum2"): (one[0], 3) for name, one in sums().items()}
        write_dat(file, values)
    whole = file.read_bytes()

    @each(amount, 100)
    @given(damages())
    def check(damage: Damage) -> None:
        file.write_bytes(damage(whole))
        within_limits(lambda: read_imatrix(file))

    check()


READERS: dict[str, tuple[Callable[[Path], object], list[Path]]] = {
    "stream": (load_config, sorted(EXAMPLES.glob("stream*.yml"))),
    "tune": (load_tuning, sorted(EXAMPLES.glob("tune*.yml"))),
    "merge": (read_documents, sorted(EXAMPLES.glob("*.yml"))),
}


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("kind", READERS)
def test_text_of_yaml(kind: str, amount: str, tmp_path: Path) -> None:
    """Bytes of the examples, damaged: mostly no YAML any more."""
    read, files = READERS[kind]
    assert files
    texts = [file.read_bytes() for file in files]
    target = tmp_path / "c.yml"

    @each(amount, 100)
    @given(st.sampled_from(texts), damages())
    def check(text: bytes, damage: Damage) -> None:
        target.write_bytes(damage(text))
        within_limits(lambda: read(target))

    check()


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("kind", ["stream", "tune"])
def test_documents(kind: str, amount: str) -> None:
    """The examples with other values in them: YAML still, but not what was meant."""
    read, files = READERS[kind]
    documents = [yaml.safe_load(file.read_text()) for file in files]

    @each(amount, 250)
    @given(st.sampled_from(documents), replacements())
    def check(document: Any, change: Callable[[Any], Any]) -> None:
        changed = change(document)
        if isinstance(changed, dict):
            within_limits(lambda: read(changed))  # type: ignore[arg-type]

    check()


@pytest.mark.parametrize("amount", AMOUNTS)
def test_rows_of_token_ids(amount: str) -> None:
    good = {
        "input_ids": [1, 2, 3], "attention_mask": [1, 1, 0], "token_type_ids": [0, 0, 1],
        "decoder_input_ids": [1, 2], "decoder_attention_mask": [1, 1], "pixel_values": [[0.5]],
    }  # fmt: skip

    def read(row: Any) -> None:
        try:
            read_ids(row, "input_ids")
        except Unusable as reason:
            raise InputError(str(reason)) from reason

    @each(amount, 250)
    @given(replacements())
    def check(change: Callable[[Any], Any]) -> None:
        row = change(good)
        if isinstance(row, dict) and "input_ids" in row:
            within_limits(lambda: read(row))

    check()
