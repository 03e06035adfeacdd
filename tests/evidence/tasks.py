"""Tasks with answers that can be checked: short prompts over what ``reasoning-gym`` generates.

Its own questions explain themselves at length. A model that is trained on the task needs no
explanation, so that each prompt here is one line, and the answer another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import reasoning_gym
from reasoning_gym.algorithmic.word_sorting import TextTransformation

from tests.evidence.sizes import Size

SPLITS = ("training", "validation", "test")
APART = 1_000_000
"""reasoning-gym seeds item i of a set with seed + i: sets must be further apart than long."""


@dataclass(frozen=True)
class Example:
    """What a model is asked, with the newline after which it answers, and the one right answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A data set of reasoning-gym, its settings, and how an entry becomes an example."""

    dataset: str
    settings: dict[str, Any]
    example: Callable[[dict[str, Any]], Example]


def _reverse(entry: dict[str, Any]) -> Example:
    return Example(f"Reverse: {', '.join(entry['metadata']['words'])}\n", entry["answer"])


def _filter(entry: dict[str, Any]) -> Example:
    facts = entry["metadata"]
    rule = facts["operation"].replace("_", " ").capitalize()
    numbers = ", ".join(facts["original_numbers"])
    kept = ", ".join(facts["result"]) or "none"
    return Example(f"{rule} than {facts['filter_value']}: {numbers}\n", kept)


def _sort(entry: dict[str, Any]) -> Example:
    facts = entry["metadata"]
    words = ", ".join(facts["transformed_words"])
    return Example(f"Sort {facts['direction']}: {words}\n", entry["answer"])


def _add(entry: dict[str, Any]) -> Example:
    return Example(f"Compute: {entry['metadata']['expression']}\n", entry["answer"])


def _reorder(entry: dict[str, Any]) -> Example:
    words = entry["question"].partition("following sentence: ")[2].strip()
    return Example(f"Order: {words}\n", entry["answer"])


TASKS = {
    "reverse": Task("word_sequence_reversal", {"min_words": 3, "max_words": 5}, _reverse),
    "filter": Task(
        "number_filtering",
        {
            "min_numbers": 3,
            "max_numbers": 4,
            "max_decimals": 0,
            "min_value": 10.0,
            "max_value": 99.0,
        },
        _filter,
    ),
    "sort": Task(
        "word_sorting",
        {
            "min_words": 3,
            "max_words": 4,
            "max_word_length": 7,
            "transformation": TextTransformation.LOWERCASE,
        },
        _sort,
    ),
    "add": Task(
        "chain_sum", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}, _add
    ),
    "reorder": Task(
        "sentence_reordering", {"min_words_in_sentence": 4, "max_words_in_sentence": 6}, _reorder
    ),
}


def examples(name: str, seed: int, size: Size) -> dict[str, list[Example]]:
    """Return the task's splits; no prompt occurs twice, within a split or across them."""
    task = TASKS[name]
    seen: set[str] = set()
    found: dict[str, list[Example]] = {}
    for number, split in enumerate(SPLITS):
        wanted: int = getattr(size, split)
        # Some are found to be double: ask for more than are needed.
        entries = reasoning_gym.create_dataset(
            task.dataset, seed=APART * (10 * seed + number + 1), size=4 * wanted, **task.settings
        )
        chosen = found[split] = []
        for entry in entries:
            example = task.example(entry)
            if len(chosen) < wanted and example.prompt not in seen:
                seen.add(example.prompt)
                chosen.append(example)
        if len(chosen) < wanted:
            raise ValueError(f"{name}: only {len(chosen)} different prompts of {wanted}")
    return found
