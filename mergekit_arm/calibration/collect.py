"""The forward loop: token blocks through the model, sums at its sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mergekit_arm.calibration.batches import Batch
from mergekit_arm.calibration.sites import SitePlan, layer_input
from mergekit_arm.errors import Failure
from mergekit_arm.statistics.observers import Observer

_TOKENS = "tokens"

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
    _earlier: Mapping[str, Tensor] | None = None
    """State to continue from, until it is known on which device."""

    def update(self, x: Tensor, batch: Batch) -> None:
        """Add an input of any leading shape; observers are made on its device."""
        rows = x.reshape(-1, x.shape[-1])
        self.prepare(rows.device)
        for name, observer in self.observers.items():
            seen = batch.sampled(rows) if self.statistics[name].sampled else rows
            batch.add(self.name, name, partial(observer.update, seen))
        batch.add(self.name, _TOKENS, partial(self._count, rows.shape[0]))

    def prepare(self, device: torch.device) -> None:
        """Make the observers, on ``device``, unless they are made."""
        if self.observers:
            return
        self.observers = {
            name: statistic.make(self.plan.width, device)
            for name, statistic in self.statistics.items()
        }
        if self._earlier is not None:
            for name, observer in self.observers.items():
                prefix = f"{name}."
                observer.load_state(
                    {
                        key.removeprefix(prefix): value
                        for key, value in self._earlier.items()
                        if key.startswith(prefix)
                    }
                )
            self._earlier = None

    def state(self) -> dict[str, Tensor]:
        """Return all that has accumulated; every entry adds up."""
        if self._earlier is not None:
            return dict(self._earlier)
        state = {_TOKENS: torch.tensor(self.tokens)}
        for name, observer in self.observers.items():
            state.update({f"{name}.{key}": value for key, value in observer.state().items()})
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from an earlier ``state()``."""
        self.tokens = int(state[_TOKENS])
        self.observers = {}
        # Without observers there was no input yet, and there is nothing to continue.
        self._earlier = state if len(state) > 1 else None

    def _count(self, tokens: int) -> None:
        self.tokens += tokens


class NotFinite(Failure):
    """An activation is a NaN or an infinity: this model cannot be measured as it is."""


class Collector:
    """Hooks on a model that feed its sites, for the duration of ``with``."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.batch: Batch | None = None
        """What is under way; between batches nothing is measured."""
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

    def resume(self, batch: Batch) -> None:
        """Measure, as of ``batch``."""
        self.batch = batch

    def pause(self) -> None:
        """Measure nothing until there is another batch."""
        self.batch = None

    def check(self) -> None:
        """Stop at the first site whose input held a NaN or an infinity.

        Costs one synchronisation, so it is called once a batch.

        Raises:
            NotFinite: naming the weight that reads the bad input.
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
                    raise NotFinite(
                        f"NaN or infinity in the input of {site.plan.readings[0].parameter}: "
                        "the model or the dtype is broken; try --dtype float32"
                    )

    def _hook(self, site: Site) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def observe(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = layer_input(args, kwargs)
            if x is not None and self.batch is not None:
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
