"""Units: done once, and what a kill leaves behind does no harm."""

from __future__ import annotations

import json
from pathlib import Path

from tests.evidence.units import Key, Line, Store, Unit


def unit(calls: list[str], label: str) -> Unit:
    def compute() -> Line:
        calls.append(label)
        return {"losses": [1.0, 2.0]}

    return Unit(Key("streams", "tiny", "reverse", 0, "test", label), compute)


def test_a_unit_is_done_once(tmp_path: Path) -> None:
    calls: list[str] = []
    first = Store("streams", "tiny", tmp_path).run(unit(calls, "a"))
    again = Store("streams", "tiny", tmp_path).run(unit(calls, "a"))
    assert calls == ["a"]
    assert first == again
    assert {"commit", "machine", "seconds", "losses"} <= first.keys()


def test_a_line_that_was_cut_short_is_done_again(tmp_path: Path) -> None:
    calls: list[str] = []
    store = Store("streams", "tiny", tmp_path)
    store.run(unit(calls, "a")), store.run(unit(calls, "b"))
    whole = store.path.read_bytes()
    for end in (1, 5, 200):  # without its newline a line is whole all the same
        store.path.write_bytes(whole[:-end])
        calls.clear()
        store.run(unit(calls, "a")), store.run(unit(calls, "b")), store.run(unit(calls, "c"))
        assert calls == (["c"] if end == 1 else ["b", "c"])
        assert len(store.lines()) == 3


def test_lines_are_json_one_each(tmp_path: Path) -> None:
    store = Store("streams", "tiny", tmp_path)
    for label in "abc":
        store.run(unit([], label))
    lines = [json.loads(text) for text in store.path.read_text().splitlines()]
    assert [line["unit"][-1] for line in lines] == ["a", "b", "c"]
