"""Settings of an operator, one changed at a time: where its defaults come from.

Judged on the validation split, with the loss on general text, and never tuned: what is compared are
the settings, at one learning rate or scale.
"""

from __future__ import annotations

from typing import Any

from tests.evidence.recipes import Recipe, Statistics

SWEEP, TURNS = "sweep", "turns"
PARTS = (SWEEP, TURNS)
"""Each with a first setting of its own, with which the others are compared."""


def _statistics(of: str, change: str = "", *, each: bool = False) -> Statistics:
    return Statistics(f"{of}~{change}" if change else of, each=each)


def steps() -> list[Recipe]:
    """Return steps of ``arm`` with ``task_stats`` towards early checkpoints, the default first."""

    def step(what: str, change: str = "", text: str = "general", **settings: Any) -> Recipe:
        whole = {
            "learning_rate": 1.0,
            "retain": 0.3,
            "activation_stats": _statistics(text, change),
            "task_stats": _statistics("task", change),
            **settings,
        }
        return Recipe(what, "arm", ("early",), (whole,))

    return [
        step("as it is: κ = 0.3, α = 0.9, whole bases, turned fully"),
        *(step(f"κ = {retain}", retain=retain) for retain in (0.03, 0.1, 1.0, 3.0)),
        step("α = 0.45", "half"),
        step("α = 0", "diagonal"),
        step("16 columns a basis", "16"),
        step("64 columns a basis", "64"),
        step("general text: docstrings", text="docstrings"),
        step("general text: code", text="code"),
        step("turned by half", turn=0.5),
    ]


def turns() -> list[Recipe]:
    """Return steps of ``arm`` towards late checkpoints: how far to turn, away from how much.

    An energy of 0.01 is the leading direction alone.
    """

    def step(what: str, rotation: float, energy: float) -> Recipe:
        whole = {
            "learning_rate": 1.0,
            "rotation": rotation,
            "energy": energy,
            "activation_stats": _statistics("general"),
        }
        return Recipe(what, "arm", ("late",), (whole,))

    energies = {-0.7: (0.01, 0.3, 0.5, 0.7, 0.9), -0.4: (0.01, 0.9), -1.0: (0.01, 0.5, 0.9)}
    return [
        step("no turn", 0.0, 0.9),
        *(
            step(f"ρ = {rotation}, energy {energy}", rotation, energy)
            for rotation, some in energies.items()
            for energy in some
        ),
    ]


def regressions(tasks: tuple[str, ...]) -> list[Recipe]:
    """Return merges by ``regmean``, the default first."""

    def merged(what: str, change: str = "", **settings: Any) -> Recipe:
        own = _statistics("own", change, each=True)
        return Recipe(
            what, "regmean", tasks, ({"scale": 1.0, "activation_stats": own, **settings},)
        )

    return [
        merged("as it is: α = 0.9, κ = 0, whole bases"),
        *(merged(f"α = {alpha}", alpha=alpha) for alpha in (0.0, 0.5, 1.0)),
        *(merged(f"κ = {retain}", retain=retain) for retain in (0.1, 1.0, 3.0, 10.0)),
        merged("16 columns a basis", "16"),
        merged("64 columns a basis", "64"),
    ]
