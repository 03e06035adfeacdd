"""Held-out data as tokens: batches within their bound, of chats the answers only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mergekit.options import MergeOptions

from mergekit_arm.errors import InputError
from mergekit_arm.judging.heldout import HeldOut, ScoredSequence, load_heldout
from mergekit_arm.judging.judge import Judge
from mergekit_arm.judging.sets import HeldOutSet
from tests.support.streams import add_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_batches_stay_within_their_bound() -> None:
    sequences = [ScoredSequence(torch.ones(n).long(), torch.ones(n).bool()) for n in range(1, 30)]
    batches = list(HeldOut(sequences, False).batches(elements=2000, width=20, batch_size=None))
    assert all(ids.numel() * 20 <= 2000 for ids, _, _ in batches)
    assert sum(int(mask.sum()) for _, mask, _ in batches) == sum(range(1, 30))


def test_of_chats_only_the_answers_are_scored(tmp_path: Path) -> None:
    tokenizer = add_tokenizer(tmp_path, template=TEMPLATE)
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three?"},
        {"role": "assistant", "content": "four five"},
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": chat}) + "\n")
    held = load_heldout(HeldOutSet(dataset=str(file)), [tokenizer])
    assert held.answers_only
    answers = [tokenizer.decode(s.ids[s.scored]) for s in held.sequences]
    assert answers == ["two\n", "four five\n"]
    contexts = [tokenizer.decode(s.ids[~s.scored]) for s in held.sequences]
    assert contexts[0] == "<system>be brief\n<user>one?\n<assistant>"
    assert contexts[1] == contexts[0] + "two\n<user>three?\n<assistant>"


def test_other_forms_of_chats_are_scored_alike(tmp_path: Path) -> None:
    """ShareGPT's and Alpaca's rows, the first of them empty."""
    tokenizer = add_tokenizer(tmp_path, template=TEMPLATE)
    turns = [{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]
    for number, rows in enumerate(
        (
            [{"conversations": []}, {"conversations": turns}],
            [{"instruction": "", "output": ""}, {"instruction": "one?", "output": "two"}],
        )
    ):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for seed in range(3):
            held = load_heldout(HeldOutSet(dataset=str(file), seed=seed), [tokenizer])
            assert [tokenizer.decode(s.ids[s.scored]) for s in held.sequences] == ["two\n"]


@pytest.mark.parametrize("role", ["user", "gpt"])
def test_chats_without_an_answer_are_refused(tmp_path: Path, role: str) -> None:
    tokenizer = add_tokenizer(tmp_path, template=TEMPLATE)
    chat = [{"role": "user", "content": "one?"}, {"role": role, "content": "two?"}]
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": chat}) + "\n")
    with pytest.raises(InputError, match="no row has a message of the role assistant"):
        load_heldout(HeldOutSet(dataset=str(file)), [tokenizer])


def test_long_chats_keep_what_precedes_the_answer(tmp_path: Path) -> None:
    tokenizer = add_tokenizer(tmp_path, template=TEMPLATE)
    file = tmp_path / "chats.jsonl"
    for question, answer in (("q" * 50, "short"), ("q", "a" * 50)):
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        file.write_text(json.dumps({"messages": chat}) + "\n")
        settings = HeldOutSet(dataset=str(file), sequence_length=16)
        (sequence,) = load_heldout(settings, [tokenizer]).sequences
        assert len(sequence.ids) == 16
        text = tokenizer.decode(sequence.ids[sequence.scored])
        assert text == ("short\n" if answer == "short" else "a" * len(text))
        assert not sequence.scored[0]


def test_chats_need_a_template_from_somewhere(tmp_path: Path) -> None:
    bare = add_tokenizer(tmp_path / "bare")
    other = add_tokenizer(tmp_path / "other", template=TEMPLATE)
    file = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file.write_text(json.dumps({"messages": chat}) + "\n")
    settings = HeldOutSet(dataset=str(file))
    with pytest.raises(InputError, match="neither the base nor the checkpoint has a chat"):
        load_heldout(settings, [bare])
    assert load_heldout(settings, [bare, other]).scored_tokens == 2
    references = [str(tmp_path / "bare"), str(tmp_path / "other")]
    assert Judge({"one": settings}, references, MergeOptions()).heldout("one").answers_only
