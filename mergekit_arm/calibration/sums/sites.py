"""The inputs to measure, and what has been seen of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mergekit_arm.calibration.inputs.readings import SitePlan
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.sums.batches import Batch
from mergekit_arm.statistics.kinds import chosen
from mergekit_arm.statistics.kinds.base import Kind, MeasuredInput, Observer, Operation

_TOKENS = "tokens"


@dataclass
class Site:
    """A measured input and what has been seen of it."""

    name: str
    plan: SitePlan
    kinds: tuple[Kind, ...]
    """Of the run, with its settings."""
    left_out: Mapping[str, str]
    """Names of the kinds that are not measured here, and why."""
    observers: dict[str, Observer] = field(default_factory=dict)
    """By the kind's name; none before the first input."""
    tokens: int = 0
    _earlier: Mapping[str, Tensor] | None = None
    """State to continue from, until it is known on which device."""

    @property
    def here(self) -> list[Kind]:
        """The kinds that are measured at this site."""
        return [kind for kind in self.kinds if kind.name not in self.left_out]

    def update(self, x: Tensor, batch: Batch) -> None:
        """Add an input of any leading shape; observers are made on its device."""
        rows = x.reshape(-1, x.shape[-1])
        self.prepare(rows.device)
        for kind in self.here:
            seen = batch.sampled(rows) if kind.sampled else rows
            batch.add(self.name, kind.name, partial(self.observers[kind.name].update, seen))
        batch.add(self.name, _TOKENS, partial(self._count, rows.shape[0]))

    def prepare(self, device: torch.device) -> None:
        """Make the observers, on ``device``, unless they are made."""
        if self.observers:
            return
        self.observers = {kind.name: kind.observer(self.plan.width, device) for kind in self.here}
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
        """Return all that has accumulated; ``operations`` says how each entry adds up."""
        if self._earlier is not None:
            return dict(self._earlier)
        state = {_TOKENS: torch.tensor(self.tokens)}
        for name, observer in self.observers.items():
            state.update({f"{name}.{key}": value for key, value in observer.state().items()})
        return state

    def operations(self) -> dict[str, Operation]:
        """Return, by the keys of ``state``, how what two processes saw becomes one."""
        found = {_TOKENS: Operation.SUM}
        for kind in self.here:
            state = kind.state(self.plan.width)
            found |= {f"{kind.name}.{key}": spec.adds for key, spec in state.items()}
        return found

    def result_bytes(self) -> int:
        """Return how much a directory will hold of it at most; 0 until there was an input."""
        measured = (kind for kind in self.here if kind.name in self.observers)
        return sum(kind.stored_bytes(self.plan.width) for kind in measured)

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


def measured_input(plan: SitePlan, head: nn.Module | None) -> MeasuredInput:
    """Return what kinds of statistics may know of a site; ``head`` is the model's output head."""
    matrices = [reading for reading in plan.readings if reading.matrix]
    return MeasuredInput(
        plan.width,
        matrix=bool(matrices),
        head=all(any(layer is head for layer in reading.layers) for reading in matrices),
        experts=plan.experts,
    )


def plan_sites(
    model: PreTrainedModel, plans: list[SitePlan], options: CalibrationOptions
) -> list[Site]:
    """Decide what is measured at each site, with the settings that ``options`` give the kinds."""
    head = model.get_output_embeddings()
    kinds = chosen_kinds(options)
    sites = []
    for plan in plans:
        source = measured_input(plan, head)
        left_out = {kind.name: why for kind in kinds if (why := kind.left_out(source))}
        if plan.experts is None:
            sites.append(Site(site_name(plan), plan, kinds, left_out))
        for expert in range(plan.experts or 0):
            sites.append(Site(f"{site_name(plan)}[{expert}]", plan, kinds, left_out))
    return sites


def chosen_kinds(options: CalibrationOptions) -> tuple[Kind, ...]:
    """Return the kinds of statistics to measure, with the run's settings."""
    settings = asdict(options)
    return tuple(kind.configured(settings) for kind in chosen(options.statistics))
