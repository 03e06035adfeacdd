"""Early checkpoints of a run, merged: against the converged model and every other checkpoint.

A run is one task with one seed. Each method steps from the base to an average of checkpoints, and
has its learning rate tuned; the test split sees one setting of each.
"""

from __future__ import annotations

from collections.abc import Collection
from statistics import fmean

from tests.evidence.averages import AVERAGES
from tests.evidence.group import Group, in_order
from tests.evidence.judging import generate_missed, judge_answers, judge_general
from tests.evidence.merging import BASE, State, merge, put
from tests.evidence.recipes import ByDepth, ByName, Recipe, Settings, Statistics, plain
from tests.evidence.runs import Base, Run, average, states
from tests.evidence.sizes import FRACTIONS, Size
from tests.evidence.sweeps import SWEEP, TURNS, steps, turns
from tests.evidence.tuning import best
from tests.evidence.units import Line, Store, Unit
from tests.evidence.walks import WALKS, Walk, follow

STUDY = "streams"
SWEEPS = {SWEEP: steps, TURNS: turns}
CONVERGED = "100 %"
GENERAL, TASK, RANDOM = (Statistics(of) for of in ("general", "task", "random"))


def percent(fraction: float) -> str:
    """Return what a checkpoint is called."""
    return f"{100 * fraction:.0f} %"


CHECKPOINTS = {percent(fraction): fraction for fraction in FRACTIONS}


def recipes(size: Size) -> dict[str, list[Recipe]]:
    """Return the merges by stage: ``core`` is what the question needs, the rest comes after."""

    def tuned(label: str, source: str, **settings: object) -> Recipe:
        grid = tuple({"learning_rate": rate, **settings} for rate in size.rates)
        return Recipe(label, "arm", (source,), grid)

    def linear(source: str) -> Recipe:
        grid = tuple({"weight": rate} for rate in size.rates)
        return Recipe(f"linear to {source}", "task_arithmetic", (source,), grid)

    def turned(source: str, rotation: float, of: Statistics) -> Recipe:
        label = f"arm to {source}, {of.of} text, ρ = {rotation}".replace("random text", "random")
        return tuned(label, source, rotation=rotation, energy=0.9, activation_stats=of)

    def varied(what: str, **settings: object) -> Recipe:
        settings = {"energy": 0.9, "activation_stats": GENERAL, **settings}
        return tuned(f"arm to early, {what}", "early", **settings)

    def leading(source: str, rotation: float) -> Recipe:
        """Turned away from the one direction with most of the second moment."""
        label = f"arm to {source}, leading direction alone, ρ = {rotation}"
        one = {"rotation": rotation, "energy": 0.01, "activation_stats": GENERAL}
        return tuned(label, source, **one)

    def searched(source: str) -> Recipe:
        """ρ is chosen along with the rate, so that fewer rates are tried."""
        near = size.rates[len(size.rates) // 2 - 1 :][:2]
        grid = tuple(
            {
                "learning_rate": rate,
                "rotation": rotation,
                "energy": 0.9,
                "activation_stats": GENERAL,
            }
            for rotation in (-0.4, -0.8)
            for rate in near
        )
        return Recipe(f"arm to {source}, ρ searched", "arm", (source,), grid)

    def protected(source: str) -> Recipe:
        grid = tuple(
            {"weight": rate, "omega": 0.4, "activation_stats": GENERAL} for rate in size.rates
        )
        return Recipe(f"aim to {source}", "aim_task_arithmetic", (source,), grid)

    def retaining(source: str, retain: float) -> Recipe:
        label = f"arm to {source}, task_stats, κ = {retain}"
        return tuned(label, source, retain=retain, activation_stats=GENERAL, task_stats=TASK)

    return {
        "core": [
            linear("early"),
            turned("early", -0.4, GENERAL),
            retaining("early", 0.3),
            turned("early", -0.4, RANDOM),
        ],
        "early": [
            turned("early", -0.2, GENERAL),
            turned("early", -0.7, GENERAL),
            turned("early", -0.4, TASK),
            retaining("early", 1.0),
        ],
        "late": [
            linear(CONVERGED),
            linear("late"),
            turned("late", -0.7, GENERAL),
            turned("late", -0.7, RANDOM),
            retaining("late", 0.3),
            leading("late", -0.7),
            leading("late", -1.0),
        ],
        # Other operators, each as many tries: kept in the package only if they win here.
        "variants": [
            varied("attention alone", rotation=ByName((("self_attn", -0.7), ("", 0.0)))),
            varied("MLP alone", rotation=ByName((("mlp", -0.7), ("", 0.0)))),
            varied("down projections alone", rotation=ByName((("down_proj", -0.7), ("", 0.0)))),
            varied("first layers more", rotation=ByDepth(-0.8, 0.0)),
            varied("last layers more", rotation=ByDepth(0.0, -0.8)),
            varied("leading direction alone", rotation=-0.7, energy=0.01),
            searched("early"),
            protected("early"),
        ],
    }


class Stream(Group):
    """The units of one run."""

    study = STUDY

    def __init__(self, base: Base, task: str, seed: int, store: Store) -> None:
        super().__init__(base, (task,), seed, store)
        self.run = Run(base, task, seed)

    def state(self, name: str) -> State:
        """Return the weights of the base, a checkpoint or an average."""
        kept = self.base.kept(self)
        if name not in kept:
            if name == BASE:
                kept[name] = self.base.state()
            elif name in AVERAGES:
                parts = AVERAGES[name]
                found = [states(self.run.checkpoint(fraction)) for fraction in parts]
                kept[name] = average(found, list(parts.values()))
            else:
                return states(self.run.checkpoint(CHECKPOINTS[name]))
        return kept[name]

    def merged(self, recipe: Recipe, settings: Settings) -> State:
        """Merge with these settings."""
        models = {name: self.state(name) for name in recipe.models}
        return merge(
            recipe.method,
            self.state(BASE),
            models,
            settings,
            lambda of, _: self.run.statistics(of),
        )

    def judge(self, split: str, state: State) -> Line:
        """Return everything that is kept of a model's judgement on one split."""
        put(self.base.model, state)
        line = judge_answers(self.base.model, self.run.encoded[split]).line()
        if split == "test":
            line["general"] = judge_general(self.base.model, self.base.general)
        return {"data": self.run.data_digest(), **line}

    def write(self, recipe: Recipe | None, name: str) -> Unit:
        """Generate answers of the test split with what the ``test`` line of this name judged."""

        def compute() -> Line:
            judged = self.store.run(self.final(recipe) if recipe else self.single(name, "test"))
            if recipe:
                # Lines of a time when a setting was not named lack it.
                told = judged["settings"].items()
                (settings,) = (s for s in recipe.grid if told <= plain(s).items())
                state = self.merged(recipe, settings)
            else:
                state = self.state(name)
            generated = generate_missed(
                put(self.base.model, state),
                self.base.tokenizer,
                self.run.encoded["test"],
                self.run.examples["test"],
                judged["exact"],
            )
            return {"data": self.run.data_digest(), "generated": generated}

        return Unit(self.key("generated", recipe.label if recipe else name), compute)

    def training(self) -> Unit:
        """Train, and keep every step's loss."""
        return Unit(
            self.key("training"),
            lambda: {"data": self.run.data_digest(), **self.run.train()},
        )

    def single(self, name: str, split: str) -> Unit:
        """Judge the base, a checkpoint or an average as it is."""
        return Unit(self.key(split, name), lambda: self.judge(split, self.state(name)))

    def walk(self, walk: Walk) -> Unit:
        """Judge on the test split where a step after another led."""

        def loss(state: State) -> float:
            return fmean(self.judge("validation", state)["losses"])

        def compute() -> Line:
            state, rates = follow(walk, self.run, self.state(BASE), self.base.size.rates, loss)
            return {"settings": {"learning_rates": rates}, **self.judge("test", state)}

        return Unit(self.key("test", walk.label), compute)

    def best_checkpoint(self) -> Unit:
        """Judge on the test split the one checkpoint that is best on the validation split."""

        def compute() -> Line:
            tried = [self.store.run(self.single(name, "validation")) for name in CHECKPOINTS]
            name = list(CHECKPOINTS)[best(tried)]
            return {"settings": {"checkpoint": name}, **self.judge("test", self.state(name))}

        return Unit(self.key("test", "best checkpoint"), compute)

    def stage(self, name: str) -> list[Unit]:
        """Return the units of one of ``STAGES``."""
        if name == "training":
            return [self.training()]
        if name == "singles":
            judged = [self.single(one, "test") for one in (BASE, CONVERGED, "early")]
            judged += [self.single(one, "validation") for one in CHECKPOINTS]
            return [*judged, self.best_checkpoint()]
        if name == "averages":
            return [self.single(one, "test") for one in AVERAGES]
        if name in SWEEPS:
            return [self.swept(name, recipe) for recipe in SWEEPS[name]()]
        if name == "walks":
            return [self.walk(one) for one in WALKS]
        if name == "generated":
            merges = [one for part in ("core", "late") for one in recipes(self.base.size)[part]]
            singles = [self.write(None, one) for one in (BASE, CONVERGED, "early")]
            return singles + [self.write(recipe, recipe.models[0]) for recipe in merges]
        chosen = recipes(self.base.size)[name]
        attempts = [unit for recipe in chosen for unit in self.attempts(recipe)]
        return attempts + [self.final(recipe) for recipe in chosen]


STAGES = (
    "training",
    "singles",
    "core",
    SWEEP,
    TURNS,
    "variants",
    "walks",
    "averages",
    "late",
    "early",
    "generated",
)
CORE = STAGES[:3]
"""What the study's question needs."""


def units(base: Base, store: Store, stages: Collection[str] = STAGES) -> list[Unit]:
    """Return the study's units: all tasks with the first seed, then the next seed."""

    def streams(seed: int) -> list[Stream]:
        return [Stream(base, task, seed, store) for task in base.size.tasks]

    return in_order(streams, base.size.seeds, CORE, STAGES[len(CORE) :], stages)
