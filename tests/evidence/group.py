"""What every study does with the models that belong together: try settings, then judge the best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence

from tests.evidence.judging import judge_general
from tests.evidence.merging import State
from tests.evidence.recipes import Recipe, Settings, plain
from tests.evidence.runs import Base
from tests.evidence.tuning import best
from tests.evidence.units import Key, Line, Store, Unit


class Group(ABC):
    """The units of one run, or of the specialists that are merged with one another."""

    study: str

    def __init__(self, base: Base, tasks: tuple[str, ...], seed: int, store: Store) -> None:
        self.base, self.tasks, self.seed, self.store = base, tasks, seed, store

    def key(self, part: str, label: str = "") -> Key:
        """Return the key of one of this group's lines."""
        size = self.base.size.name
        return Key(self.study, size, "+".join(self.tasks), self.seed, part, label)

    @abstractmethod
    def merged(self, recipe: Recipe, settings: Settings) -> State:
        """Merge with these settings."""

    @abstractmethod
    def judge(self, split: str, state: State) -> Line:
        """Return everything that is kept of a model's judgement on one split."""

    @abstractmethod
    def stage(self, name: str) -> list[Unit]:
        """Return the units of a stage, each of which may be done without the others."""

    def attempts(self, recipe: Recipe) -> list[Unit]:
        """Judge a merge on the validation split with every setting of its grid."""

        def attempt(settings: Settings) -> Callable[[], Line]:
            return lambda: {
                "settings": plain(settings),
                **self.judge("validation", self.merged(recipe, settings)),
            }

        return [
            Unit(self.key("validation", recipe.tried(number)), attempt(settings))
            for number, settings in enumerate(recipe.grid)
        ]

    def final(self, recipe: Recipe) -> Unit:
        """Judge a merge on the test split with the settings that were best on the validation."""

        def compute() -> Line:
            number = 0
            if len(recipe.grid) > 1:
                number = best([self.store.run(unit) for unit in self.attempts(recipe)])
            settings = recipe.grid[number]
            judged = self.judge("test", self.merged(recipe, settings))
            return {"settings": plain(settings), **judged}

        return Unit(self.key("test", recipe.label), compute)

    def swept(self, part: str, recipe: Recipe) -> Unit:
        """Judge a merge with its one setting on the validation split, and by what it forgets."""

        def compute() -> Line:
            (settings,) = recipe.grid
            judged = self.judge("validation", self.merged(recipe, settings))
            judged["general"] = judge_general(self.base.model, self.base.general)
            return {"settings": plain(settings), **judged}

        return Unit(self.key(part, recipe.label), compute)


def in_order(
    groups: Callable[[int], Sequence[Group]],
    seeds: Sequence[int],
    core: Sequence[str],
    rest: Sequence[str],
    wanted: Collection[str],
) -> list[Unit]:
    """Return a study's units, seed after seed: ``core`` of all groups first, then the rest."""
    found: dict[str, Unit] = {}
    for seed in seeds:
        some = groups(seed)
        for part in (core, rest):
            stages = [stage for stage in part if stage in wanted]
            for group in some:
                units = [unit for stage in stages for unit in group.stage(stage)]
                found |= {str(unit.key): unit for unit in units if str(unit.key) not in found}
    return list(found.values())
