"""What a row is: recognised, said, and never measured when it says nothing."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_arm.data.blocks import build_corpus
from mergekit_arm.data.formats import Unusable, find_format
from mergekit_arm.errors import InputError
from tests.support.byte_tokenizer import TEMPLATE, byte_tokenizer

CHAT = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]
SHAREGPT = [{"from": "human", "value": "hi there"}, {"from": "gpt", "value": "hello"}]
RENDERED = "<user>hi there<assistant>hello"


def read_all(rows: list[dict[str, Any]], column: str | None = None) -> list[Any]:
    form = find_format(rows, list(rows[0]), column)
    found = []
    for row in rows:
        try:
            found.append(form.read(row))
        except Unusable:
            found.append(None)
    return found


def build(rows: list[dict[str, Any]], tokenizer: Any = None, **changes: Any) -> Any:
    settings = {"split": None, "column": None, "samples": 4, "sequence_length": 30, "seed": 1}
    tokenizer = tokenizer or byte_tokenizer(TEMPLATE)
    return build_corpus(datasets.Dataset.from_list(rows), tokenizer, **{**settings, **changes})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": CHAT}, "read as chat messages, column messages"),
        (
            {"messages": json.dumps(CHAT)},
            "read as chat messages written as JSON, column messages",
        ),
        ({"conversations": SHAREGPT}, "read as ShareGPT chats, column conversations"),
        (
            {"conversations": json.dumps(SHAREGPT)},
            "read as ShareGPT chats written as JSON, column conversations",
        ),
        ({"messages": SHAREGPT}, "read as ShareGPT chats, column messages"),
        ({"conversations": CHAT}, "read as chat messages, column conversations"),
        (
            {"instruction": "hi there", "input": "", "output": "hello"},
            "read as Alpaca instructions, columns instruction, input, output",
        ),
        (
            {"prompt": "hi there", "completion": "hello"},
            "read as chats of a prompt and its completion, columns prompt, completion",
        ),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
            "read as chats of a prompt and its completion, columns prompt, completion",
        ),
        (
            {"prompt": "hi there", "response": "hello", "id": "7"},
            "read as chats of a prompt and its response, columns prompt, response",
        ),
        (
            {"question": "hi there", "answer": "hello", "topic": "talk"},
            "read as chats of a question and its answer, columns question, answer",
        ),
    ],
)
def test_chats_of_every_kind(row: dict[str, Any], said: str) -> None:
    corpus = build([row])
    assert byte_tokenizer().decode(corpus.blocks[0]) == RENDERED
    assert corpus.notes == (f"1 row used ({said})",)
    assert corpus.column == said.split(", ", 1)[1].split(" ", 1)[1]


def test_the_input_of_an_instruction_follows_it() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3"}
    assert read_all([row]) == [
        [{"role": "user", "content": "Add.\n\n1, 2"}, {"role": "assistant", "content": "3"}]
    ]


def test_sharegpt_has_other_names_for_those_who_speak() -> None:
    speakers = ["system", "human", "gpt", "observation", "assistant", "user"]
    (chat,) = read_all([{"conversations": [{"from": who, "value": "x"} for who in speakers]}])
    roles = [message["role"] for message in chat]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user"]


EMPTY: list[Any] = [
    None,
    [],
    "",
    "[]",
    "not JSON",
    [{"role": "user", "content": ""}, {"role": "assistant", "content": None}],
    [{"role": "user", "content": "  "}],
]


@given(st.lists(st.sampled_from([*EMPTY, CHAT]), min_size=1, max_size=8))
def test_empty_chats_are_never_measured(values: list[Any]) -> None:
    rows = [{"messages": CHAT}, *({"messages": value} for value in values)]
    for row, found in zip(rows, read_all(rows), strict=True):
        assert found == (CHAT if row["messages"] == CHAT else None)


@pytest.mark.parametrize("empty", [None, "", "   \n"])
def test_an_empty_first_row_does_not_matter(empty: str | None) -> None:
    """Whichever row comes first, the others are used; the reason is counted."""
    rows = [{"text": empty if number < 19 else "a" * 40} for number in range(20)]
    for seed in range(5):
        corpus = build(rows, seed=seed)
        assert len(corpus.blocks) == 1
        (note,) = corpus.notes
        assert note == "1 row used; 19 left out: 19 empty (read as text, column text)"


def test_an_empty_first_chat_or_row_of_ids_does_not_matter() -> None:
    chats = [{"messages": CHAT if number == 0 else []} for number in range(20)]
    ids = [{"input_ids": [1, 2] if number == 0 else None} for number in range(20)]
    for seed in range(5):
        assert "19 left out: 19 empty" in build(chats, seed=seed).notes[0]
        assert "19 left out: 19 empty" in build(ids, seed=seed).notes[0]


def test_a_column_that_is_named_wins() -> None:
    rows = [{"text": "the text", "conversations": SHAREGPT, "other": "another"}]
    assert read_all(rows) == ["the text"]
    assert read_all(rows, "conversations")[0][0]["content"] == "hi there"
    assert read_all(rows, "other") == ["another"]


def test_text_that_looks_like_json_stays_text() -> None:
    assert read_all([{"text": json.dumps(CHAT)}]) == [json.dumps(CHAT)]


def test_what_cannot_be_recognised_is_described() -> None:
    with pytest.raises(InputError, match=r"holds lists of \{who, what\}; expected .*role"):
        read_all([{"messages": [{"who": "a", "what": "b"}]}])
    with pytest.raises(InputError, match="choose with --text-column: a, b"):
        read_all([{"a": "x", "b": "y"}])
    with pytest.raises(InputError, match="'messages' is empty in the first rows"):
        read_all([{"messages": None}])


def test_chats_without_a_template_name_both_remedies() -> None:
    with pytest.raises(InputError, match=r"holds ShareGPT chats .*--chat-template.*--tokenizer"):
        build([{"conversations": SHAREGPT}], byte_tokenizer())


def test_a_row_that_the_template_refuses_is_left_out() -> None:
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TEMPLATE
    )
    system = [{"role": "system", "content": "be brief"}, *CHAT]
    corpus = build([{"messages": CHAT}, {"messages": system}], byte_tokenizer(strict))
    assert "1 left out: 1 refused by the chat template" in corpus.notes[0]
    with pytest.raises(InputError, match="refuses every row: no system role"):
        build([{"messages": system}], byte_tokenizer(strict))
