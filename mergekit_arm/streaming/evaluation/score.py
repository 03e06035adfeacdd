"""How good a model is: its loss on held-out tokens, or a number from a command of the user's."""

from __future__ import annotations

import gc
import math
import re
import shlex
import subprocess
import weakref
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from pydantic import BaseModel, ConfigDict
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mergekit_arm.errors import Failure, InputError
from mergekit_arm.models.loading import (
    choose_device,
    choose_dtype,
    find_model,
    load_model,
)
from mergekit_arm.models.tokenizer import load_own_tokenizer
from mergekit_arm.streaming.config import Evaluation
from mergekit_arm.streaming.evaluation.heldout import IGNORED, HeldOut, load_heldout

LOGIT_ELEMENTS = 1 << 26
"""Of one batch's logits by default: 256 MB in float32."""

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class Score(BaseModel):
    """One model's result, as the state stores it; what was not asked for is None."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: float | None = None
    """Mean negative log-likelihood in nats over the scored tokens."""
    perplexity: float | None = None
    """exp(loss)."""
    metric: float | None = None
    """What the user's command said."""

    def better_than(self, other: Score, settings: Evaluation) -> bool:
        """Say whether this decides for itself against ``other``; equal is not better."""
        if settings.metric_goal is None:
            assert self.loss is not None
            assert other.loss is not None
            return self.loss < other.loss
        assert self.metric is not None
        assert other.metric is not None
        if settings.metric_goal == "minimize":
            return self.metric < other.metric
        return self.metric > other.metric


class Judge:
    """Scores models on the same held-out tokens; the data is read when it is first needed."""

    def __init__(
        self,
        settings: Evaluation,
        references: list[str],
        merge: MergeOptions,
        *,
        changes_tokens: bool = False,
    ) -> None:
        """``references``: the base, then models whose chat template may stand in for its own.

        ``changes_tokens``: the merges change the tokenizer, so that ids must be compared.
        """
        self.settings = settings
        self._changes_tokens = changes_tokens
        self._references = list(references)
        self._merge = merge
        self._held: HeldOut | None = None

    def add_reference(self, reference: str) -> None:
        """Add a model whose chat template may be used, if the data was not read yet."""
        if self._held is None and reference not in self._references:
            self._references.append(reference)

    @property
    def heldout(self) -> HeldOut:
        """The tokenised data.

        Raises:
            InputError: it cannot be used.
        """
        if self._held is None:
            self._held = load_heldout(self.settings, self._tokenizers())
        return self._held

    def score(self, reference: str, scratch: Path, *, run_command: bool = True) -> Score:
        """Score a model without adapter.

        ``run_command`` false leaves out the user's, for models that only lend their loss. Loads
        the model for the loss and frees it before the command starts.

        Raises:
            Failure: a loss that is not finite, or a command that fails or prints no number.
        """
        loss = self._loss(reference) if self.settings.dataset is not None else None
        metric = None
        if self.settings.metric_command is not None and run_command:
            # A directory: what evaluators know of Hub names ends before @revision.
            folder = ModelReference.parse(reference).local_path(self._merge.transformers_cache)
            metric = run_metric(self.settings.metric_command, folder, scratch)
        return Score(loss=loss, perplexity=None if loss is None else _exp(loss), metric=metric)

    def _loss(self, reference: str) -> float:
        device = choose_device(self.settings.device)
        dtype = choose_dtype(self.settings.dtype, device)
        self._check_tokens(reference)
        with find_model(
            reference,
            trust_remote_code=self._merge.trust_remote_code,
            lora_cache=self._merge.lora_merge_cache,
        ) as source:
            model = load_model(source, device, dtype)
        loss = mean_loss(model, self.heldout, self.settings.batch_size)
        alive = weakref.ref(model)
        del model
        if alive() is not None:  # a cycle holds it; collecting always would cost half a second
            gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not math.isfinite(loss):
            raise Failure(
                f"the loss of {reference} on {self.settings.dataset} is {loss}: "
                "the model is broken; try a lower learning_rate"
            )
        return loss

    def _check_tokens(self, reference: str) -> None:
        """Refuse a model to which the base's token ids mean other tokens."""
        if not self._changes_tokens:
            return
        base, own = (
            load_own_tokenizer(one, self._merge.trust_remote_code)
            for one in (self._references[0], reference)
        )
        if base is None or own is None:
            return
        known = own.get_vocab()
        for token, number in base.get_vocab().items():
            if known.get(token) != number:
                raise InputError(
                    f"evaluation: token {token!r} is {number} in the base, {known.get(token)} in "
                    f"{reference}, so that losses cannot be compared: judge by a metric_command "
                    "alone, or use tokenizer_source: base"
                )

    def _tokenizers(self) -> list[PreTrainedTokenizerBase]:
        trust = self._merge.trust_remote_code
        loaded = [load_own_tokenizer(reference, trust) for reference in self._references]
        return [tokenizer for tokenizer in loaded if tokenizer is not None]


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, held: HeldOut, batch_size: int | None = None) -> float:
    """Return the mean negative log-likelihood (nats) of the scored tokens.

    Logits in float32, the sum in float64. Holds one batch's logits, ``LOGIT_ELEMENTS`` of
    them or one sequence's, or those of ``batch_size`` sequences.

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
    total, count = 0.0, 0
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
    return total / count


def run_metric(command: str, model: str, scratch: Path) -> float:
    """Run the user's command for ``model`` and return the last number it printed on its own line.

    ``{model}`` becomes the model's directory and ``{scratch}`` an empty directory for files.

    Raises:
        Failure: it fails, or no line of its output is a number.
    """
    filled = command.replace("{model}", shlex.quote(model))
    filled = filled.replace("{scratch}", shlex.quote(str(scratch)))
    done = subprocess.run(filled, shell=True, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Failure(
            f"metric_command ended with status {done.returncode}: "
            f"{said[-1][:200] if said else 'it said nothing'} (it was: {filled})"
        )
    numbers = [line.strip() for line in done.stdout.splitlines()]
    numbers = [line for line in numbers if _NUMBER.fullmatch(line)]
    if not numbers:
        raise Failure(
            f"metric_command printed no line that is a number; end it with one (it was: {filled})"
        )
    return float(numbers[-1])


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
