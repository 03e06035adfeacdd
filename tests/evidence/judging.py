"""What a model is worth: its answers on a task, and its loss on general text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tests.evidence.encoding import IGNORED, Encoded, padded
from tests.evidence.tasks import Example

ROWS = 25
"""Examples in a batch."""
DIGITS = 4
"""Of a loss that is kept."""


@dataclass(frozen=True)
class Answers:
    """What became of every example, in their order."""

    losses: list[float]
    """Mean negative log-likelihood (nats) of the answer's tokens, its end among them."""
    exact: str
    """``1`` where every token of the answer, and its end, is the likeliest, given those before."""

    def line(self) -> dict[str, Any]:
        """Return what is kept of it."""
        return {"losses": [round(loss, DIGITS) for loss in self.losses], "exact": self.exact}


@torch.inference_mode()
def judge_answers(model: PreTrainedModel, data: Sequence[Encoded]) -> Answers:
    """Judge the answers, each token given the right ones before it (teacher forcing).

    The output head is applied where answers are, and nowhere else: with a large vocabulary it is
    a good part of the work.
    """
    losses, exact = [0.0] * len(data), ["0"] * len(data)
    head = model.get_output_embeddings()
    order = sorted(range(len(data)), key=lambda i: len(data[i].prompt) + len(data[i].answer))
    for start in range(0, len(order), ROWS):
        numbers = order[start : start + ROWS]
        batch = padded([data[i] for i in numbers], int(model.config.eos_token_id))
        labels = batch.pop("labels").to(model.device)[:, 1:]
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        hidden = model.base_model(**batch).last_hidden_state[:, :-1]
        answers = labels != IGNORED
        logits = head(hidden[answers]).float()
        loss = cross_entropy(logits, labels[answers], reduction="none")
        right = logits.argmax(-1) == labels[answers]
        lengths = answers.sum(1).tolist()
        parts = zip(numbers, loss.split(lengths), right.split(lengths), strict=True)
        for number, one, hit in parts:
            losses[number] = float(one.double().mean())
            exact[number] = "1" if bool(hit.all()) else "0"
    return Answers(losses, "".join(exact))


@torch.inference_mode()
def judge_general(model: PreTrainedModel, blocks: Sequence[Sequence[int]]) -> list[float]:
    """Return every block's mean negative log-likelihood (nats) of all its tokens but the first."""
    found = []
    for start in range(0, len(blocks), 4):
        ids = torch.tensor(blocks[start : start + 4]).to(model.device)
        logits = model(input_ids=ids).logits[:, :-1].float()
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        found += [round(one, DIGITS) for one in loss.view(len(ids), -1).double().mean(1).tolist()]
    return found


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[Encoded],
    examples: Sequence[Example],
) -> str:
    """Return ``1`` for every example whose greedily generated answer is the right text.

    Batches of prompts of one length, so that no padding changes a model's mind.
    """
    right = ["0"] * len(data)
    longest = max(len(row.answer) for row in data) + 2
    order = sorted(range(len(data)), key=lambda i: len(data[i].prompt))
    while order:
        length = len(data[order[0]].prompt)
        numbers = [i for i in order[: 2 * ROWS] if len(data[i].prompt) == length]
        order = order[len(numbers) :]
        ids = torch.tensor([data[i].prompt for i in numbers]).to(model.device)
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=longest,
            do_sample=False,
            pad_token_id=model.config.eos_token_id,
            eos_token_id=model.config.eos_token_id,
        )
        for number, row in zip(numbers, written[:, length:], strict=True):
            text = tokenizer.decode(row, skip_special_tokens=True)
            right[number] = "1" if text.strip() == examples[number].answer.strip() else "0"
    return "".join(right)


def generate_missed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[Encoded],
    examples: Sequence[Example],
    exact: str,
) -> str:
    """Return what ``generate`` would, generating only where ``exact`` has no ``1``.

    Where every token is the likeliest after the right ones before it, greedy decoding writes just
    these. What is left are answers that reach the same text by other tokens.
    """
    missed = [i for i, one in enumerate(exact) if one == "0"]
    right = list(exact)
    if missed:
        again = generate(model, tokenizer, [data[i] for i in missed], [examples[i] for i in missed])
        for number, one in zip(missed, again, strict=True):
            right[number] = one
    return "".join(right)
