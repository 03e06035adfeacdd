"""Specialists of one base, merged: each method with and without AIM, as many settings for each.

The specialists are the converged models of two runs with one seed. Settings are chosen by the mean
loss over all tasks' validation splits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from tests.evidence.group import Group, in_order
from tests.evidence.judging import judge_answers, judge_general
from tests.evidence.merging import BASE, State, merge, put
from tests.evidence.recipes import Recipe, Settings, Statistics
from tests.evidence.runs import Base, Run, made, states
from tests.evidence.searches import METHODS, searched
from tests.evidence.sizes import Size
from tests.evidence.sweeps import SWEEP, regressions
from tests.evidence.units import Line, Store, Unit

STUDY = "specialists"
GENERAL = Statistics("general")
OWN = Statistics("own", each=True)
SPARSE = {"density": 0.5, "normalize": False}
"""TIES would divide the weights by their sum, so that one for all models changed nothing."""

OMEGAS = (0.0, 0.4)
"""What AIM tries: half of its budget each, with three of the weights."""

CALIBRATION_TOKENS = tuple(2**power for power in range(9, 16))
"""On how many tokens of general text AIM's importance is measured, where that is the question."""


def recipes(size: Size, tasks: tuple[str, ...]) -> dict[str, list[Recipe]]:
    """Return the merges by stage: ``core`` is what the question needs, the rest comes after."""
    strengths = {"weight": size.weights, "scale": tuple(round(w + 0.2, 2) for w in size.weights)}
    """RegMean's weights only say which model counts more; its scale is 1, and tried around that."""
    half = len(size.weights) // 2
    upper = {strength: values[half:] for strength, values in strengths.items()}
    """AIM shrinks a merge, so that larger weights may suit it."""
    lower = size.weights[1 : 1 + half]

    def tuned(method: str, strength: str = "weight", **settings: object) -> Recipe:
        grid = tuple({strength: value, **settings} for value in strengths[strength])
        return Recipe(method, method, tasks, grid)

    def informed(
        method: str, values: tuple[float, ...], strength: str = "weight", **settings: object
    ) -> Recipe:
        grid = tuple(
            {strength: value, "omega": omega, "activation_stats": GENERAL, **settings}
            for omega in OMEGAS
            for value in values
        )
        return Recipe(f"aim_{method}", f"aim_{method}", tasks, grid)

    def lighter() -> Recipe:
        """The upper half was best where it begins: from the weight where task arithmetic is."""
        label = f"aim_task_arithmetic, weights from {lower[0]}"
        return replace(informed("task_arithmetic", lower), label=label)

    def whole(label: str, **settings: object) -> Recipe:
        """As in AIM's paper: nothing is tuned."""
        method = "aim" if settings else "task_arithmetic"
        return Recipe(label, method, tasks, ({"weight": 1.0, **settings},))

    def regmean(what: str = "", of: Statistics = OWN, **settings: object) -> Recipe:
        plain = tuned("regmean", "scale", activation_stats=of, **settings)
        return replace(plain, label=f"regmean{what}")

    def turned(label: str, of: Statistics) -> Recipe:
        """All specialists in one step of ``arm``, away from the base's leading direction."""
        away = {"rotation": -1.0, "energy": 0.01, "activation_stats": of}
        grid = tuple({"learning_rate": weight, **away} for weight in size.weights)
        return Recipe(label, "arm", tasks, grid)

    return {
        "core": [
            tuned("task_arithmetic"),
            informed("task_arithmetic", upper["weight"]),
            lighter(),
            regmean(),
            whole("task_arithmetic, weights 1"),
            whole("aim, weights 1, ω = 0", omega=0.0, activation_stats=GENERAL),
            whole("aim, weights 1, permuted", omega=0.0, activation_stats=Statistics("permuted")),
            whole("aim, weights 1, even", omega=0.0, activation_stats=Statistics("even")),
        ],
        "turned": [turned("arm", GENERAL), turned("arm, random", Statistics("random"))],
        "sparse": [
            tuned("ties", **SPARSE),
            informed("ties", lower, **SPARSE),
            tuned("dare_ties", **SPARSE),
            informed("dare_ties", lower, **SPARSE),
        ],
        "moments": [
            regmean(", general text", Statistics("own-general", each=True)),
            regmean(", no data", Statistics("own-free", each=True)),
            regmean(", κ = 1", retain=1.0),
            informed("regmean", upper["scale"], "scale", activation_stats=OWN),
        ],
        "calibration": [
            whole("aim, weights 1, task text", omega=0.0, activation_stats=Statistics("tasks")),
            *(
                whole(f"aim, weights 1, {tokens} tokens", omega=0.0, activation_stats=some)
                for tokens in CALIBRATION_TOKENS
                for some in [Statistics(f"general-{tokens}")]
            ),
        ],
    }


class Specialists(Group):
    """The units of one pair, or triple."""

    study = STUDY

    def __init__(self, base: Base, tasks: tuple[str, ...], seed: int, store: Store) -> None:
        super().__init__(base, tasks, seed, store)
        self.runs = {task: Run(base, task, seed) for task in tasks}

    def state(self, name: str) -> State:
        """Return the weights of the base or of a task's specialist."""
        kept = self.base.kept(self)
        if name not in kept:
            folder = self.base.folder if name == BASE else self.runs[name].checkpoint(1.0)
            kept[name] = states(folder)
        return kept[name]

    def merged(self, recipe: Recipe, settings: Settings) -> State:
        """Merge with these settings; what is random in a method is the same each time."""
        torch.manual_seed(self.seed)
        models = {task: self.state(task) for task in recipe.models}

        return merge(recipe.method, self.state(BASE), models, settings, self.locate)

    def locate(self, of: str, model: str) -> Path:
        """Return the directory of a model's statistics of this name."""
        if model != BASE:
            return self.runs[model].statistics(of)
        if of != "tasks":
            return self.base.statistics(of)
        out = self.base.work / f"statistics-{'-'.join(self.tasks)}-{self.seed}"
        texts = [text for run in self.runs.values() for text in run.texts()]
        return made(out, lambda: self.base.measure(texts, self.base.folder, out))

    def judge(self, split: str, state: State) -> Line:
        """Return everything that is kept of a model's judgement on all tasks."""
        put(self.base.model, state)
        judged = {
            task: judge_answers(self.base.model, run.encoded[split]).line()
            for task, run in self.runs.items()
        }
        line: Line = {
            "data": "+".join(run.data_digest() for run in self.runs.values()),
            "losses": [loss for one in judged.values() for loss in one["losses"]],
            "exact": "".join(one["exact"] for one in judged.values()),
        }
        if split == "test":
            line["general"] = judge_general(self.base.model, self.base.general)
        return line

    def single(self, name: str) -> Unit:
        """Judge the base or a specialist on all tasks."""
        return Unit(self.key("test", name), lambda: self.judge("test", self.state(name)))

    def search(self, method: str) -> Unit:
        """Judge on the test splits what ``mergekit-arm tune`` finds with a grid's budget."""

        def compute() -> Line:
            state, settings = searched(method, self.runs, self.seed)
            return {"settings": settings, **self.judge("test", state)}

        return Unit(self.key("test", f"{method}, by tune"), compute)

    def stage(self, name: str) -> list[Unit]:
        """Return the units of one of ``STAGES``."""
        if name == "singles":
            return [self.single(one) for one in (BASE, *self.tasks)]
        if name == SWEEP:
            return [self.swept(name, recipe) for recipe in regressions(self.tasks)]
        if name == "searches":
            return [self.search(method) for method in METHODS]
        return [self.final(recipe) for recipe in recipes(self.base.size, self.tasks)[name]]


STAGES = ("singles", "core", SWEEP, "turned", "moments", "calibration", "sparse", "searches")
CORE = STAGES[:2]
"""What the study's question needs."""


def units(base: Base, store: Store, stages: Collection[str] = STAGES) -> list[Unit]:
    """Return the study's units: all groups with the first seed, then the next seed."""

    def groups(seed: int) -> list[Specialists]:
        return [Specialists(base, tasks, seed, store) for tasks in base.size.groups]

    return in_order(groups, base.size.seeds, CORE, STAGES[len(CORE) :], stages)
