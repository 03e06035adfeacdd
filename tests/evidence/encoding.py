"""Examples as token ids: the prompt, the answer, and an end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tests.evidence.tasks import Example

IGNORED = -100
"""The label of a token that is not learnt and not judged."""


@dataclass(frozen=True)
class Encoded:
    """One example; the answer ends with the token after which a model stops."""

    prompt: list[int]
    answer: list[int]


def encode(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Encoded]:
    """Tokenise prompt and answer apart, so that what is generated starts where the answer does."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    end = tokenizer.eos_token_id
    return [Encoded(ids(one.prompt), [*ids(one.answer), end]) for one in examples]


def padded(rows: Sequence[Encoded], fill: int) -> dict[str, Tensor]:
    """Return ids, mask and labels (rows, longest), padded at the right; answers have labels."""
    longest = max(len(row.prompt) + len(row.answer) for row in rows)
    ids = torch.full((len(rows), longest), fill)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        size, start = len(row.prompt) + len(row.answer), len(row.prompt)
        ids[number, :size] = torch.tensor(row.prompt + row.answer)
        mask[number, :size] = 1
        labels[number, start:size] = torch.tensor(row.answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
