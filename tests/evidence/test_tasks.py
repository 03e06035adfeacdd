"""Tasks: splits that share nothing, answers that are right."""

from __future__ import annotations

from dataclasses import replace

import pytest

reasoning_gym = pytest.importorskip("reasoning_gym", reason="pip install -e '.[evidence]'")

from tests.evidence.sizes import SIZES  # noqa: E402
from tests.evidence.tasks import SPLITS, TASKS, examples  # noqa: E402

SIZE = replace(SIZES["tiny"], training=64, validation=60, test=200)


def right(name: str, prompt: str) -> str:
    """Solve a prompt by hand."""
    order, _, given = prompt.strip().partition(": ")
    items = given.split(", ")
    if name == "reverse":
        return ", ".join(items[::-1])
    if name == "sort":
        return ", ".join(sorted(items, reverse=order.endswith("descending")))
    if name == "add":
        total, sign = 0, 1
        for token in given.split():
            if token in "+-":
                sign = 1 if token == "+" else -1
            else:
                total += sign * int(token)
        return str(total)
    keep, side, _, border = order.split()
    kept = [
        item
        for item in items
        if (int(item) != int(border) and (int(item) > int(border)) == (side == "larger"))
        == (keep == "Keep")
    ]
    return ", ".join(kept) or "none"


@pytest.mark.parametrize("name", ["reverse", "sort", "add", "filter"])
def test_answers_are_right(name: str) -> None:
    for split in examples(name, 0, SIZE).values():
        for one in split:
            assert one.answer == right(name, one.prompt), one


def test_reordering_keeps_the_words() -> None:
    for one in examples("reorder", 0, SIZE)["test"]:
        asked = one.prompt.strip().partition(": ")[2]
        assert sorted(asked.split()) == sorted(one.answer.split())


@pytest.mark.parametrize("name", list(TASKS))
def test_splits_share_nothing(name: str) -> None:
    found = examples(name, 0, SIZE)
    assert {split: len(found[split]) for split in SPLITS} == {
        split: getattr(SIZE, split) for split in SPLITS
    }
    prompts = [one.prompt for some in found.values() for one in some]
    assert len(set(prompts)) == len(prompts)


def test_a_seed_is_a_data_set_of_its_own() -> None:
    first, again, other = (examples("reverse", seed, SIZE) for seed in (0, 0, 1))
    assert first == again
    shared = {one.prompt for one in first["training"]} & {one.prompt for one in other["training"]}
    assert len(shared) < 3
