"""The forward loop: token blocks through the model, sums at its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_arm.calibration.inputs.readings import SitePlan
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.sums.batches import Batch
from mergekit_arm.statistics.kinds.base import Observer
from mergekit_arm.statistics.kinds.importance import Importance
from mergekit_arm.statistics.kinds.subspace import Subspace

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
    expert: int | None = None
    """Whose share of the input it is, where the weight has many experts."""
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

    def result_bytes(self) -> int:
        """Return how much a directory will hold of it at most; 0 until there was an input."""
        return sum(observer.result_bytes() for observer in self.observers.values())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from an earlier ``state()``."""
        self.tokens = int(state[_TOKENS])
        self.observers = {}
        # Without observers there was no input yet, and there is nothing to continue.
        self._earlier = state if len(state) > 1 else None

    def _count(self, tokens: int) -> None:
        self.tokens += tokens


def site_name(plan: SitePlan) -> str:
    """Return the name of a site: the first layer that reads there."""
    return plan.readings[0].parameter.removesuffix(".weight")


def plan_sites(
    model: PreTrainedModel, plans: list[SitePlan], options: CalibrationOptions
) -> list[Site]:
    """Decide what is measured at each site.

    Subspaces only where a matrix other than the output head reads: nothing else is rotated. Nor
    are experts: their sketches would be a hundred times those of the rest of the model.
    """
    every = {
        "importance": Statistic(Importance),
        "subspace": Statistic(
            partial(
                Subspace,
                rank=options.rank,
                energy=options.energy,
                seed=options.seed,
                keep_sketch=options.keep_sketch,
            ),
            sampled=True,
            matrices_only=True,
        ),
    }
    head = model.get_output_embeddings()
    sites = []
    for plan in plans:
        rotated = plan.experts is None and any(
            reading.matrix and not any(layer is head for layer in reading.layers)
            for reading in plan.readings
        )
        chosen = {
            name: every[name]
            for name in options.statistics
            if rotated or not every[name].matrices_only
        }
        if plan.experts is None:
            sites.append(Site(site_name(plan), plan, chosen))
        for expert in range(plan.experts or 0):
            sites.append(Site(f"{site_name(plan)}[{expert}]", plan, chosen, expert))
    return sites
