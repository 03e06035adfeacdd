"""Scores a model in shares of the data, so that a bad one need not see all of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel

from mergekit_arm.judging.heldout import HeldOut
from mergekit_arm.judging.judge import Judge, Scores
from mergekit_arm.judging.loss import mean_loss
from mergekit_arm.judging.sets import HeldOutSet

SHARES = 4
"""Into how many parts the data of every set is cut, each like the whole."""

OnTokens = Callable[[int, int], None]
"""Called with scored tokens so far and in all."""


@dataclass
class ShareScorer:
    """Scores loaded models on the data of a judge's sets, share by share."""

    judge: Judge
    _parts: dict[str, list[HeldOut]] = field(default_factory=dict)

    def losses(
        self,
        model: PreTrainedModel,
        on_tokens: OnTokens | None = None,
    ) -> Iterator[Scores]:
        """Yield the mean losses (nats) so far, on every set of data, after each share.

        The last is over all of the data. The shares are the same for every model.
        """
        sums: dict[str, list[tuple[float, int]]] = {name: [] for name in self._names()}
        done, total = 0, self.tokens
        for share in range(SHARES):
            for name in sums:
                held = self._shares(name)
                if share >= len(held):
                    continue
                settings = self.judge.sets[name]
                assert isinstance(settings, HeldOutSet)
                before = done

                def count(tokens: int, _total: int, _mean: float, before: int = before) -> None:
                    if on_tokens is not None:
                        on_tokens(before + tokens, total)

                loss = mean_loss(model, held[share], settings.batch_size, count)
                scored = held[share].scored_tokens
                sums[name].append((loss * scored, scored))
                done += scored
            yield {
                name: math.fsum(loss for loss, _ in parts) / sum(scored for _, scored in parts)
                for name, parts in sums.items()
            }

    @property
    def tokens(self) -> int:
        """Scored tokens of all sets together."""
        return sum(self.judge.heldout(name).scored_tokens for name in self._names())

    def metrics(self, folder: str, scratch: Path) -> Scores:
        """Return what every command says of the model in ``folder``."""
        return self.judge.metrics(folder, scratch)

    def _names(self) -> list[str]:
        return [n for n, one in self.judge.sets.items() if isinstance(one, HeldOutSet)]

    def _shares(self, name: str) -> list[HeldOut]:
        if name not in self._parts:
            held = self.judge.heldout(name)
            # A sequence without a scored token would make a share that has no mean.
            useful = [one for one in held.sequences if bool(one.scored.any())]
            parts = [useful[share::SHARES] for share in range(SHARES)]
            self._parts[name] = [HeldOut(part, held.answers_only) for part in parts if part]
        return self._parts[name]
