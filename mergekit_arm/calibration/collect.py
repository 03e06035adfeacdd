"""The forward loop: token blocks through the model, sums at its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mergekit_arm.calibration.sites import SitePlan, layer_input
from mergekit_arm.errors import Failure
from mergekit_arm.statistics.observers import Observer

ObserverFactory = Callable[[int, torch.device], Observer]


@dataclass(frozen=True)
class Statistic:
    """A kind of observer and where it applies."""

    make: ObserverFactory
    sampled: bool = False
    """Fed the token sample instead of every token."""
    matrices_only: bool = False
    """Not measured where only norms or the output head read."""


@dataclass
class Site:
    """A measured input and what has been seen of it."""

    name: str
    plan: SitePlan
    statistics: Mapping[str, Statistic]
    observers: dict[str, Observer] = field(default_factory=dict)
    tokens: int = 0

    def update(self, x: Tensor, batch: Batch) -> None:
        """Add an input of any leading shape; observers are made on its device."""
        rows = x.reshape(-1, x.shape[-1])
        if not self.observers:
            self.observers = {
                name: statistic.make(rows.shape[1], rows.device)
                for name, statistic in self.statistics.items()
            }
        for name, observer in self.observers.items():
            observer.update(batch.sampled(rows) if self.statistics[name].sampled else rows)
        self.tokens += rows.shape[0]


@dataclass
class Batch:
    """What the hooks must know of the batch that is under way."""

    tokens: int = 0
    sample: Tensor | None = None
    """Sampled rows; None means all."""

    def sampled(self, rows: Tensor) -> Tensor:
        """Return the sampled rows of an input that has one row for each token, or all rows."""
        if self.sample is None or rows.shape[0] != self.tokens:
            return rows
        return rows[self.sample.to(rows.device)]


class Collector:
    """Hooks on a model that feed its sites, for the duration of ``with``."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.batch = Batch()
        self._handles: list[Any] = []

    def __enter__(self) -> Collector:
        for site in self.sites:
            for layer in site.plan.layers:
                self._handles.append(
                    layer.register_forward_pre_hook(self._hook(site), with_kwargs=True)
                )
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def check(self) -> None:
        """Stop at the first site whose input held a NaN or an infinity.

        Costs one synchronisation, so it is called once a batch.

        Raises:
            Failure: naming the weight that reads the bad input.
        """
        seen = [site for site in self.sites if site.observers]
        sums: dict[torch.device, list[tuple[Site, Tensor]]] = {}
        for site in seen:
            for observer in site.observers.values():
                total = observer.checksum()
                sums.setdefault(total.device, []).append((site, total))
        for pairs in sums.values():
            finite = torch.isfinite(torch.stack([total for _, total in pairs])).tolist()
            for (site, _), good in zip(pairs, finite, strict=True):
                if not good:
                    raise Failure(
                        f"NaN or infinity in the input of {site.plan.readings[0].parameter}: "
                        "the model or the dtype is broken; try --dtype float32"
                    )

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def observe(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = layer_input(args, kwargs)
            if x is not None:
                site.update(x, self.batch)

        return observe


@contextmanager
def without_logits(model: PreTrainedModel) -> Iterator[None]:
    """Let the output head hand its input through instead of multiplying it.

    The head's input is measured all the same, and the largest product of a small model is
    never computed. Whatever a model does between its last layer and its head still happens,
    which calling the decoder alone would miss.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    forward = head.forward
    head.forward = _identity
    try:
        yield
    finally:
        # An instance attribute hid the class's method; only a hook of another library's own
        # (accelerate) leaves one behind that must be put back.
        del head.forward
        if head.forward != forward:
            head.forward = forward


def _identity(x: Tensor, *_: object, **__: object) -> Tensor:
    return x
