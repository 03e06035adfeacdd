"""What a kind of statistic is: what it accumulates at an input, and what becomes of that.

A kind is one file like ``importance.py`` and one line in ``kinds/__init__.py``; nothing else in
the package names it. It derives from ``Kind`` and says, for an input of some width,

- which tensors accumulate, and how each adds up: ``state``;
- how a batch enters them, and what is made of them at the end: ``observer``;
- which tensors a directory stores, of which size at most: ``stored``;
- where it is not measured, and why: ``left_out``.

Everything else has a default. What follows from ``state`` alone is written once for all kinds:
adding batches, ranks, resumed runs and directories, saving progress, the bound on the size.
The settings of a kind are the fields of its dataclass; one that has the name of an option of
``calibrate`` takes the option's value (``configured``).
"""

from __future__ import annotations

import dataclasses
import enum
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.format import Metadata, SettingsRecord, SiteRecord, WeightRecord

LEFT_OUT = "left_out"
"""The fact that is recorded of a site at which a kind was not measured: the reason."""


class Operation(enum.Enum):
    """How two tensors that were accumulated apart become one. Both operations start at zero."""

    SUM = "sum"
    MAX = "max"
    """Of values that are never negative."""

    def join(self, one: Tensor, other: Tensor) -> Tensor:
        """Return what both together would have accumulated."""
        return one + other if self is Operation.SUM else torch.maximum(one, other)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of one input: its dtype, its shape, and which values it may hold."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    adds: Operation = Operation.SUM
    """How it adds up; without meaning for what is stored and not accumulated."""
    at_most: bool = False
    """``shape`` bounds the last axis, which may be shorter."""
    lowest: float | None = 0.0
    """No value is below this; None: any finite value."""

    @property
    def nbytes(self) -> int:
        """How much it takes at most."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class MeasuredInput:
    """What is known of an input before anything is measured: who reads it."""

    width: int
    """Channels."""
    matrix: bool = True
    """A matrix reads it, not only norms."""
    head: bool = False
    """Of matrices, only the output head reads it."""
    experts: int | None = None
    """How many experts (or heads of a stacked norm) each read a share of their own."""


class Observer(ABC):
    """Accumulates one kind at one input, or at one expert's share of it."""

    def __init__(self, state: Mapping[str, TensorSpec], device: torch.device) -> None:
        """Start with nothing seen: zeros of ``state``'s shapes on ``device``."""
        # Apple's GPUs have no float64.
        narrow = {torch.float64: torch.float32} if device.type == "mps" else {}
        self.sums = {
            key: torch.zeros(spec.shape, dtype=narrow.get(spec.dtype, spec.dtype), device=device)
            for key, spec in state.items()
        }

    @abstractmethod
    def update(self, x: Tensor) -> None:
        """Add the rows of ``x``: (tokens, in), floating point, on the observer's device."""

    def state(self) -> dict[str, Tensor]:
        """Return what has accumulated: the tensors themselves, not copies."""
        return dict(self.sums)

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from an earlier ``state()``."""
        for key, value in self.sums.items():
            value.copy_(state[key])

    def finish(self) -> dict[str, Tensor]:
        """Return what a directory stores: the tensors that ``Kind.stored`` lists."""
        return self.state()

    def checksum(self) -> Tensor:
        """Return a scalar that is finite exactly when every input so far was finite."""
        return torch.stack([value.sum().float() for value in self.sums.values()]).sum()


T = TypeVar("T")


class Directory(Protocol):
    """What a kind needs of an open statistics directory (``statistics/read.py``)."""

    reference: str
    """What the user wrote, for messages."""
    metadata: Metadata

    def holds(self, site: str, key: str) -> bool:
        """Say whether there is a ``<site>.<key>``."""

    def tensor(self, site: str, key: str) -> Tensor:
        """Read ``<site>.<key>``."""

    def stored(self, name: str) -> Tensor:
        """Read a tensor that belongs to no site."""

    def once(self, key: Hashable, read: Callable[[], T]) -> T:
        """Return what ``read`` made for ``key``, from memory if that was lately."""

    def first(self, key: Hashable) -> bool:
        """Say whether this is the first call with ``key``: for warnings that are said once."""


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of statistic. Derived classes are frozen dataclasses; their fields are settings."""

    name: ClassVar[str]
    """As ``--statistics`` and the metadata call it."""
    sampled: ClassVar[bool] = False
    """It sees the sample of the tokens (``data/sample.py``) instead of every token."""
    recorded: ClassVar[tuple[str, ...]] = ()
    """Settings that the metadata record, since they decide the numbers."""

    def configured(self, options: Mapping[str, Any]) -> Kind:
        """Return the kind with every setting that is in ``options``."""
        names = {field.name for field in dataclasses.fields(self)} & options.keys()
        return dataclasses.replace(self, **{name: options[name] for name in names})

    def adding_up(self) -> Kind:
        """Return the kind with the settings under which what it stores adds up."""
        return self

    @abstractmethod
    def state(self, width: int) -> dict[str, TensorSpec]:
        """Return what accumulates at an input of ``width`` channels, by its key."""

    @abstractmethod
    def observer(self, width: int, device: torch.device) -> Observer:
        """Return an observer of an input of ``width`` channels that has seen nothing."""

    def measured(self, directory: Directory) -> bool:
        """Say whether ``directory`` holds this kind at all."""
        return self.name in directory.metadata.settings.statistics

    def stored(self, width: int) -> dict[str, TensorSpec]:
        """Return what a directory stores as ``<site>.<key>``; by default all that accumulated.

        Keys are unique among all kinds. What experts share is stored stacked: then every expert
        has tensors of one shape.
        """
        return self.state(width)

    def shared(self, width: int) -> dict[str, TensorSpec]:
        """Return tensors that a directory stores once for all inputs of ``width`` channels."""
        return {}

    def make_shared(self, width: int) -> dict[str, Tensor]:
        """Return the tensors that ``shared`` lists."""
        return {}

    def left_out(self, source: MeasuredInput) -> str | None:
        """Return why this kind is not measured at ``source``; None where it is."""
        return None

    def stored_bytes(self, width: int) -> int:
        """Return how much ``stored`` takes at most."""
        return sum(spec.nbytes for spec in self.stored(width).values())

    def shared_bytes(self, width: int) -> int:
        """Return how much ``shared`` takes."""
        return sum(spec.nbytes for spec in self.shared(width).values())

    def describe(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return facts for the record of a site, in JSON, from what is stored of it."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the settings that the metadata record, in JSON."""
        return {name: getattr(self, name) for name in self.recorded}

    def to_record(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of a site's or the settings' record that hold ``facts``."""
        return {"kinds": {self.name: dict(facts)}} if facts else {}

    def from_record(self, record: SiteRecord | SettingsRecord) -> dict[str, Any]:
        """Return the facts that ``to_record`` put into ``record``."""
        return dict((record.kinds or {}).get(self.name, {}))

    def inconsistent(self, site: SiteRecord, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """Say what does not agree in a site's record and its stored tensors' ``shapes``, by key."""
        return None

    def notes(self, sites: Iterable[SiteRecord]) -> list[str]:
        """Return what a user must know of the finished measurement, a sentence each."""
        return []

    def parameters(self, settings: SettingsRecord) -> dict[str, Any]:
        """Return the parameters without which a merge would refuse statistics such as these."""
        return {}

    def read(self, directory: Directory, record: WeightRecord) -> dict[str, Tensor]:
        """Return what is stored at the input of a measured weight, by its key.

        Args:
            directory: open statistics.
            record: a measured weight (``record.site`` is set).

        Returns:
            One row of each stacked tensor, where the weight is one expert of many.

        Raises:
            InputError: the directory does not hold this kind.
        """
        assert record.site is not None
        keys = self.stored(directory.metadata.sites[record.site].width)
        found = {key: directory.tensor(record.site, key) for key in keys}
        return found if record.row is None else {k: v[record.row] for k, v in found.items()}

    def add(self, parts: Sequence[Directory], site: str) -> dict[str, Tensor]:
        """Return what is stored of ``site`` when the data of all ``parts`` count together.

        What accumulated is joined entry by entry, and finished again.

        Raises:
            InputError: a part does not hold what accumulated.
        """
        record = parts[0].metadata.sites[site]
        state = self.state(record.width)
        for part in parts:
            if not all(part.holds(site, key) for key in state):
                raise InputError(f"{part.reference} {self.not_addable()}")
        total = {key: parts[0].tensor(site, key) for key in state}
        for part in parts[1:]:
            for key, spec in state.items():
                value = part.tensor(site, key)
                if value.shape != total[key].shape:
                    raise InputError(
                        f"{parts[0].reference} and {part.reference} do not add up: {site}.{key} "
                        f"has shape {list(total[key].shape)} and {list(value.shape)}"
                    )
                total[key] = spec.adds.join(total[key], value)
        if not isinstance(record.tokens, list):
            return self._finished(parts, record.width, total)
        experts = [
            self._finished(parts, record.width, {key: value[row] for key, value in total.items()})
            for row in range(len(record.tokens))
        ]
        return {key: torch.stack([one[key] for one in experts]) for key in experts[0]}

    def _finished(
        self, parts: Sequence[Directory], width: int, total: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        observer = self.adder(parts, width)
        observer.load_state(total)
        return observer.finish()

    def adder(self, parts: Sequence[Directory], width: int) -> Observer:
        """Return an observer for the sum of ``parts``; one that uses shared tensors reads them."""
        return self.observer(width, torch.device("cpu"))

    def not_addable(self) -> str:
        """Return, to follow a directory's name, why what it stores does not add up."""
        return f"does not hold all that adds up of {self.name}: calibrate again"
