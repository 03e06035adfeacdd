"""How files and documents are damaged: chosen by hypothesis, which shrinks it, or by a number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from random import Random
from typing import Any

from hypothesis import strategies as st

WAYS = ["flip", "cut", "zero", "splice", "insert", "number"]
Wrong = tuple[str, float, float, bytes]
"""A way in which files are damaged, two places as shares of the file, and what is put there."""


def wrongs() -> st.SearchStrategy[list[Wrong]]:
    """One to four of them, at places that shrink."""
    share = st.floats(0, 1, exclude_max=True)
    one = st.tuples(st.sampled_from(WAYS), share, share, st.binary(min_size=1, max_size=16))
    return st.lists(one, min_size=1, max_size=4)


def numbered_wrongs(chosen: Random) -> list[Wrong]:
    """The same, by a number."""
    return [
        (
            chosen.choice(WAYS), chosen.random(), chosen.random(),
            chosen.randbytes(chosen.randint(1, 16)),
        )
        for _ in range(chosen.randint(1, 4))
    ]  # fmt: skip


def damaged(content: bytes, steps: list[Wrong]) -> bytes:
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


WORST: list[Any] = [
    None, True, 0, -1, 7, 10**30, 10**400, 1.5, float("nan"), float("inf"), -0.0, "", "x", "a+b+c",
    "a@b@c", "../..", "\x00", "\n", "nan", "1e999", [], [[]], [None], [0.5, "x"], {}, {"x": 1},
    {None: None}, {1: 2}, {"tune": [0, 1]}, {"tune": [0, 10**400]}, {"tune": "x"}, {"value": 1},
    [{"filter": "x", "value": 1}], [{"value": {}}], {"schedule": "cosine", "peak": 1},
    {"search": [1]}, {"runs": []}, {"dataset": "x"}, {"evaluation": {"x": {"dataset": 1}}},
]  # fmt: skip


HOW = ["put", "remove", "rename", "swap"]
Change = tuple[int, str, Any, int]
"""A place, what is done there, with which value, and another place."""


def changes() -> st.SearchStrategy[list[Change]]:
    """Other values in one to three places of a document, or another key, or one less."""
    place = st.integers(0, 10**6)
    value = st.sampled_from(WORST) | st.text(max_size=8) | st.floats() | st.integers()
    one = st.tuples(place, st.sampled_from(HOW), value, place)
    return st.lists(one, min_size=1, max_size=3)


def numbered_changes(chosen: Random) -> list[Change]:
    """The same, by a number."""
    values = [
        *WORST, "".join(map(chr, chosen.choices(range(1, 0xD7FF), k=chosen.randint(0, 8)))),
        chosen.uniform(-1, 1) * 10.0 ** chosen.randint(-300, 300), chosen.randint(-(2**70), 2**70),
    ]  # fmt: skip
    return [
        (
            chosen.randint(0, 10**6), chosen.choice(HOW), chosen.choice(values),
            chosen.randint(0, 10**6),
        )
        for _ in range(chosen.randint(1, 3))
    ]  # fmt: skip


def changed(document: Any, steps: list[Change]) -> Any:
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


def places_in(node: Any) -> Any:
    if isinstance(node, dict | list):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from places_in(node[key])


Choice = tuple[st.SearchStrategy[Any], Callable[[Random], Any]]
"""How hypothesis chooses an input, and how a number does."""
DAMAGE: Choice = (wrongs(), numbered_wrongs)
CHANGES: Choice = (changes(), numbered_changes)


def one_of(several: list[Any], choice: Choice) -> Choice:
    """Choose one of them as well."""
    drawn, numbered = choice
    return (
        st.tuples(st.sampled_from(several), drawn),
        lambda chosen: (chosen.choice(several), numbered(chosen)),
    )
