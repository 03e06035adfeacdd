"""The batches that follow the leader through a model's stages, layer after layer.

A *stage* is a layer, or, behind the last, what follows them. All batches pass one stage before
the first comes to the next; between stages their hidden states are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mergekit_arm.calibration.layerwise.calls import LayerCall
from mergekit_arm.calibration.layerwise.chain import Chain
from mergekit_arm.calibration.layerwise.hidden import HiddenStates, Key
from mergekit_arm.calibration.sums.batches import Batch, Call, Feeder, Span
from mergekit_arm.calibration.sums.hooks import Collector
from mergekit_arm.calibration.sums.sites import Site
from mergekit_arm.machine import Cost


@dataclass
class _Follower:
    """One batch, and how it must be handed to each layer."""

    span: Span
    calls: list[LayerCall]
    counted: Mapping[Call, int] = field(default_factory=dict)

    def key(self, passed: int) -> Key:
        return f"{self.span.first}-{self.span.count}", passed


class Followers:
    """All batches of one process, and how far they have come."""

    def __init__(
        self, chain: Chain, hidden: HiddenStates, feeder: Feeder, device: torch.device
    ) -> None:
        self._chain = chain
        self._hidden = hidden
        self._feeder = feeder
        self._device = device
        self._batches: list[_Follower] = []
        self.begun = False
        """Whether it is known how the batches come to the layers, of which there may be none."""
        self.stage = 0
        """Where they are."""
        self.done = 0
        """How many have passed it."""

    def spans(self) -> list[Span]:
        """Return the blocks of every batch; smaller ones once memory has run out."""
        return [follower.span for follower in self._batches]

    def needed(self, *, behind: bool) -> list[Key]:
        """Return the hidden states without which they cannot go on.

        Args:
            behind: the stage is the last, whose outputs nobody needs.
        """
        return [
            follower.key(self.stage + (number < self.done and not behind))
            for number, follower in enumerate(self._batches)
        ]

    def bytes_of_first(self) -> int:
        """Return the size of the first batch's hidden states, behind the first layer."""
        return self._hidden.get(self._batches[0].key(1)).nbytes

    def begin(self, spans: Iterable[Span], sites: list[Site], *, resumed: bool) -> None:
        """Record how every batch comes to the layers; measure ``sites``, before them, meanwhile.

        Args:
            resumed: the hidden states are on the disk, where an earlier run had come further.
        """
        with Collector(sites) as collector:
            for span in spans:
                batch = self._feeder.batch(span)
                collector.batch = batch
                calls, hidden = self._chain.record(batch.ids, collector.pause)
                collector.check()
                follower = _Follower(span, calls)
                self._batches.append(follower)
                if not resumed:
                    self._hidden.put(follower.key(0), hidden)
        self._chain.drop_embeddings()
        self.begun = True

    def through_layer(
        self, forward: Callable[..., Any], sites: list[Site], passed: Callable[[Cost | None], None]
    ) -> None:
        """Let all pass the layer whose forward is ``forward``, and measure ``sites`` in it.

        ``passed`` is called behind every batch: with what it took, for the first of all.
        """

        def work(follower: _Follower, collector: Collector, batch: Batch) -> None:
            hidden = self._hidden.get(follower.key(self.stage)).to(self._device)
            args, kwargs = follower.calls[self.stage].fill(hidden)
            collector.batch = batch
            output = self._chain.form.unwrap(forward(*args, **kwargs))
            collector.check()
            self._hidden.put(follower.key(self.stage + 1), output)
            self._hidden.drop(follower.key(self.stage))

        self._follow(sites, work, passed)

    def leave(self, sites: list[Site], passed: Callable[[Cost | None], None]) -> None:
        """Let all pass what follows the layers, and measure ``sites`` in it."""

        def work(follower: _Follower, collector: Collector, batch: Batch) -> None:
            states = self._hidden.get(follower.key(self.stage)).to(self._device)
            self._chain.leave(batch.ids, states, lambda: collector.resume(batch))
            collector.check()
            collector.pause()

        self._follow(sites, work, passed)

    def _follow(
        self,
        sites: list[Site],
        work: Callable[[_Follower, Collector, Batch], None],
        passed: Callable[[Cost | None], None],
    ) -> None:
        with Collector(sites) as collector:
            while self.done < len(self._batches):
                follower = self._batches[self.done]
                limit = self._feeder.limit or follower.span.count
                if follower.span.count > limit:
                    pieces = follower.span.pieces(limit)
                    self._split(self._feeder.batch(span, follower.counted) for span in pieces)
                    continue
                batch = self._feeder.batch(follower.span, follower.counted)
                first = self.stage == self.done == 0
                with Cost(self._device) if first else nullcontext() as cost:
                    fits = self._feeder.fits(batch, partial(work, follower, collector))
                if not fits:
                    self._split(self._feeder.smaller(batch))
                    continue
                follower.counted = {}
                self.done += 1
                passed(cost)

    def _split(self, batches: Iterable[Batch]) -> None:
        """Put smaller batches in the place of the next one."""
        whole = self._batches[self.done]
        hidden = self._hidden.get(whole.key(self.stage))
        smaller = []
        for batch in batches:
            offset = batch.span.first - whole.span.first
            follower = _Follower(batch.span, self._chain.record(batch.ids)[0], batch.counted)
            self._hidden.put(
                follower.key(self.stage), hidden[offset : offset + batch.span.count].clone()
            )
            smaller.append(follower)
        self._chain.drop_embeddings()
        self._hidden.drop(whole.key(self.stage))
        self._batches[self.done : self.done + 1] = smaller
