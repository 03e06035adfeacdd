"""The mean loss of a loaded model on held-out tokens, batch by batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from mergekit_arm.errors import InputError
from mergekit_arm.judging.heldout import IGNORED, HeldOut

LOGIT_ELEMENTS = 1 << 26
"""Of one batch's logits by default: 256 MB in float32."""

OnShare = Callable[[int, int, float], None]
"""Called after every batch: scored tokens so far, in all, and their mean loss so far (nats)."""


@torch.inference_mode()
def mean_loss(
    model: PreTrainedModel,
    held: HeldOut,
    batch_size: int | None = None,
    on_share: OnShare | None = None,
) -> float:
    """Return the mean negative log-likelihood (nats) of the scored tokens.

    Logits in float32, the sum in float64. Holds one batch's logits, ``LOGIT_ELEMENTS`` of
    them or one sequence's, or those of ``batch_size`` sequences. What ``on_share`` raises ends
    the work; the batches are the same for every model of one vocabulary.

    Raises:
        InputError: a token id that the model does not have.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    highest = max(int(sequence.ids.max()) for sequence in held.sequences)
    if highest >= vocabulary:
        raise InputError(
            f"evaluation: the data holds token {highest}, but the model has a vocabulary of "
            f"{vocabulary}: base and checkpoints have different tokenizers; set tokenizer_source"
        )
    total, count, all_tokens = 0.0, 0, held.scored_tokens
    for ids, mask, labels in held.batches(
        elements=LOGIT_ELEMENTS, width=vocabulary, batch_size=batch_size
    ):
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits[
            :, :-1
        ]
        goal = labels[:, 1:].to(logits.device)
        losses = cross_entropy(
            logits.flatten(0, 1).float(), goal.flatten(), ignore_index=IGNORED, reduction="none"
        )
        total += float(losses.double().sum())
        count += int((goal != IGNORED).sum())
        if on_share is not None and count:
            on_share(count, all_tokens, total / count)
    return total / count
