"""Scores models on all evaluation sets of a file, whose data is tokenised once."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mergekit_arm.errors import InputError
from mergekit_arm.judging.heldout import HeldOut, load_heldout
from mergekit_arm.judging.loss import OnShare, mean_loss
from mergekit_arm.judging.metric import run_metric
from mergekit_arm.judging.sets import EvaluationSet, HeldOutSet, MetricSet
from mergekit_arm.models.loading import choose_device, choose_dtype, find_model, load_model
from mergekit_arm.models.tokenizer import load_own_tokenizer
from mergekit_arm.sections import section

Scores = dict[str, float]
"""By the set's name: a mean loss in nats, or what the command printed."""

Progress = Callable[[str, int, int], None]
"""Told what goes on, how much of it is done, and how much there is: 0 where that is unknown."""


@dataclass
class Judge:
    """Scores models on the same tokens and by the same commands.

    ``references``: the base, then models whose chat template may stand in for its own.
    ``changes_tokens``: merges change the tokenizer, so that ids must be compared.
    ``where``: the key under which the file has the sets, for messages; ``named``: whether it gives
    them names.
    """

    sets: Mapping[str, EvaluationSet]
    references: list[str]
    merge: MergeOptions
    device: str = "auto"
    dtype: str = "auto"
    changes_tokens: bool = False
    where: str = "evaluation"
    named: bool = True
    say: Callable[[str], None] | None = None
    """Receives what commands print."""
    log: Path | None = None
    """Holds what the last command printed."""
    progress: Progress | None = None
    """Told how far :meth:`score` is: tokens of a loss, seconds of a command's last time."""
    _seconds: dict[str, int] = field(default_factory=dict)
    _held: dict[str, HeldOut] = field(default_factory=dict)

    @property
    def has_data(self) -> bool:
        """Whether a model must be loaded to be scored."""
        return any(isinstance(one, HeldOutSet) for one in self.sets.values())

    @property
    def has_commands(self) -> bool:
        """Whether a model must lie on the disk to be scored."""
        return any(isinstance(one, MetricSet) for one in self.sets.values())

    def add_reference(self, reference: str) -> None:
        """Add a model whose chat template may be used, if no data was read yet."""
        if not self._held and reference not in self.references:
            self.references.append(reference)

    def heldout(self, name: str) -> HeldOut:
        """Return a set's tokens; reads the data at the first call.

        Raises:
            InputError: it cannot be used.
        """
        if name not in self._held:
            settings = self.sets[name]
            assert isinstance(settings, HeldOutSet)
            with section(self.place(name)):
                self._held[name] = load_heldout(settings, self._tokenizers())
        return self._held[name]

    def place(self, name: str) -> str:
        """Return where the file has the set, for messages."""
        return f"{self.where}.{name}" if self.named else self.where

    def data(self) -> dict[str, dict[str, Any]]:
        """Return of every set with data a hash of what is scored, and how many tokens that is.

        Raises:
            InputError: it cannot be used.
        """
        held = {n: self.heldout(n) for n, one in self.sets.items() if isinstance(one, HeldOutSet)}
        return {n: {"sha256": one.digest, "tokens": one.scored_tokens} for n, one in held.items()}

    def score(
        self, reference: str, scratch: Path, *, losses: bool = True, run_commands: bool = True
    ) -> Scores:
        """Score a model without adapter; a loss may be infinite or no number.

        ``losses`` and ``run_commands`` leave out what is false. Loads the model for the losses,
        and frees it before a command starts.

        Raises:
            InputError: the model cannot be scored on this data.
            Failure: a command that fails or prints no number.
        """
        found: Scores = {}
        if losses and self.has_data:
            found = self._losses_of(reference)
        if run_commands and self.has_commands:
            # A directory: what evaluators know of Hub names ends before @revision.
            folder = ModelReference.parse(reference).local_path(self.merge.transformers_cache)
            found |= self.metrics(folder, scratch)
        return {name: found[name] for name in self.sets if name in found}

    def metrics(self, folder: str, scratch: Path) -> Scores:
        """Return what every command says of the model in ``folder``."""
        found: Scores = {}
        for name, one in self.sets.items():
            if isinstance(one, MetricSet):
                begun = time.monotonic()
                found[name] = run_metric(
                    one.metric_command,
                    folder,
                    scratch,
                    timeout=one.timeout,
                    say=self.say,
                    log=self.log,
                    on_second=partial(self._tell_seconds, name),
                )
                self._seconds[name] = round(time.monotonic() - begun)
        return found

    def load(self, reference: str) -> PreTrainedModel:
        """Load a model for the forward passes.

        Raises:
            InputError: it cannot be loaded, or scored on this data.
        """
        device = choose_device(self.device)
        self._check_tokens(reference)
        with find_model(
            reference,
            trust_remote_code=self.merge.trust_remote_code,
            lora_cache=self.merge.lora_merge_cache,
        ) as source:
            return load_model(source, device, choose_dtype(self.dtype, device))

    def _losses_of(self, reference: str) -> Scores:
        model = self.load(reference)
        found = {
            name: mean_loss(model, self.heldout(name), one.batch_size, self._on_share(name))
            for name, one in self.sets.items()
            if isinstance(one, HeldOutSet)
        }
        device, alive = model.device, weakref.ref(model)
        del model
        if alive() is not None:  # a cycle holds it; collecting always would cost half a second
            gc.collect()
        empty_cache(device)
        return found

    def _on_share(self, name: str) -> OnShare:
        what = f"Evaluating {name}" if self.named else "Evaluating"

        def told(done: int, total: int, _: float) -> None:
            if self.progress is not None:
                self.progress(what, done, total)

        return told

    def _tell_seconds(self, name: str, spent: float) -> None:
        expected = self._seconds.get(name, 0)
        if self.progress is not None and (expected or not spent):
            what = f"Running {name if self.named else 'metric_command'}, seconds"
            self.progress(what, min(round(spent), expected), expected)

    def _check_tokens(self, reference: str) -> None:
        """Refuse a model to which the base's token ids mean other tokens."""
        if not self.changes_tokens:
            return
        base, own = (
            load_own_tokenizer(one, self.merge.trust_remote_code)
            for one in (self.references[0], reference)
        )
        if base is None or own is None:
            return
        known = own.get_vocab()
        for token, number in base.get_vocab().items():
            if known.get(token) != number:
                raise InputError(
                    f"{self.where}: token {token!r} is {number} in the base, {known.get(token)} in "
                    f"{reference}, so that losses cannot be compared: judge by a metric_command "
                    "alone, or use tokenizer_source: base"
                )

    def _tokenizers(self) -> list[PreTrainedTokenizerBase]:
        trust = self.merge.trust_remote_code
        loaded = [load_own_tokenizer(reference, trust) for reference in self.references]
        return [tokenizer for tokenizer in loaded if tokenizer is not None]


def empty_cache(device: torch.device) -> None:
    """Give memory that no tensor uses any more back to ``device``."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
