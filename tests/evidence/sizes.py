"""How large a study is: one configuration a size."""

from __future__ import annotations

from dataclasses import dataclass, replace

FRACTIONS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.50, 0.75, 1.0)
"""Of a run's steps, after which it leaves a checkpoint."""


@dataclass(frozen=True)
class Size:
    """What every study of this size is made of."""

    name: str
    base: str
    """``tiny``, ``smollm2`` (built from a package, without the Hub), or a name on the Hub."""
    tasks: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    """Tasks whose specialists are merged: pairs, and triples after them."""
    seeds: tuple[int, ...]
    training: int
    """Examples to learn from; so few that they are soon known by heart."""
    validation: int
    test: int
    epochs: int
    batch: int
    learning_rate: float
    block: int
    """Tokens in a block of general text."""
    general: dict[str, int]
    """Blocks of it to measure on, ``calibration``, and to judge by, ``test``."""
    rates: tuple[float, ...]
    """Learning rates that every method which follows a run tries."""
    weights: tuple[float, ...]
    """Weights of task vectors that every merge of specialists tries: one budget for all."""
    device: str = "cpu"

    @property
    def steps(self) -> int:
        """Updates of one training run."""
        return self.epochs * -(-self.training // self.batch)

    def step(self, fraction: float) -> int:
        """Return the update after which this part of the run is over."""
        return max(1, round(fraction * self.steps))


_SMALL = Size(
    name="small",
    base="smollm2",
    tasks=("reverse", "filter", "sort", "add"),
    groups=(
        ("reverse", "filter"),
        ("sort", "add"),
        ("reverse", "add"),
        ("filter", "sort"),
        ("reverse", "filter", "add"),
    ),
    seeds=(0, 1, 2),
    training=64,
    validation=60,
    test=200,
    epochs=8,
    batch=8,
    learning_rate=1e-4,
    block=128,
    general={"calibration": 48, "test": 8},
    rates=(0.6, 0.8, 1.0, 1.2),
    weights=(0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
)

# Begun first, by its losses on general text (3.5 before, 5.4 after) not what anybody would train:
# the case of a fine-tune that has forgotten nearly everything.
_HOT = replace(
    _SMALL,
    name="hot",
    epochs=12,
    batch=16,
    learning_rate=2e-4,
    rates=(0.7, 1.0, 1.3),
    weights=(0.4, 0.6, 0.8, 1.0),
)

# As many steps, and no example twice: where nothing is learnt by heart nothing of this should help.
_PLENTY = replace(_SMALL, name="plenty", training=_SMALL.training * _SMALL.epochs, epochs=1)

_TINY = Size(
    name="tiny",
    base="tiny",
    tasks=("reverse", "add"),
    groups=(("reverse", "add"),),
    seeds=(0,),
    training=16,
    validation=6,
    test=8,
    epochs=4,
    batch=4,
    learning_rate=3e-3,
    block=32,
    general={"calibration": 8, "test": 2},
    rates=(0.7, 1.0),
    weights=(0.5, 1.0),
)

_GPU = Size(
    name="gpu",
    base="HuggingFaceTB/SmolLM2-1.7B",
    tasks=("reverse", "filter", "sort", "add", "reorder"),
    groups=(
        ("reverse", "filter"),
        ("sort", "add"),
        ("reverse", "add"),
        ("filter", "reorder"),
        ("reverse", "filter", "add"),
    ),
    seeds=(0, 1, 2),
    training=128,
    validation=100,
    test=500,
    epochs=12,
    batch=16,
    learning_rate=2e-5,
    block=512,
    general={"calibration": 64, "test": 32},
    rates=(0.5, 0.7, 0.85, 1.0, 1.2, 1.4),
    weights=(0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    device="cuda",
)

SIZES = {size.name: size for size in (_TINY, _SMALL, _PLENTY, _HOT, _GPU)}
