"""Everything about a search that can be known before its first merge."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_arm.errors import InputError
from mergekit_arm.judging.judge import Judge
from mergekit_arm.judging.sets import EvaluationSet, HeldOutSet
from mergekit_arm.merging.documents import check_dtype
from mergekit_arm.merging.options import decisive_options
from mergekit_arm.models.contents import Contents, describe
from mergekit_arm.models.loading import choose_device
from mergekit_arm.models.tokenizer import load_own_tokenizer
from mergekit_arm.sections import section
from mergekit_arm.statistics.read import open_statistics
from mergekit_arm.tuning.candidates import (
    Point,
    baseline_document,
    check_by_planning,
    check_weights,
    corners,
    default_points,
    domains,
)
from mergekit_arm.tuning.config import BASELINE_WEIGHTS, TuneConfig, TuningSettings
from mergekit_arm.tuning.grid import grid
from mergekit_arm.tuning.naming import model_names
from mergekit_arm.tuning.search import Candidates
from mergekit_arm.tuning.space import METHOD, TUNE, Space, find_space

_STATISTICS = ("activation_stats", "task_stats")


@dataclass(frozen=True)
class Quest:
    """One study: a space, what may be tried of it, and what is tried first."""

    name: str
    space: Space
    candidates: Candidates
    first: list[Point]
    budget: int


@dataclass(frozen=True)
class TunePlan:
    """A search whose configuration holds together."""

    config: TuneConfig
    settings: TuningSettings
    quests: list[Quest]
    """The baseline, where there is one, and the search itself."""
    base: str | None
    inputs: list[str]
    """All models but the base, in the order of the file."""
    judge: Judge
    test: Judge | None
    fingerprint: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def quest(self) -> Quest:
        """The search itself."""
        return self.quests[-1]

    @property
    def references(self) -> list[str]:
        """The base, where there is one, then the inputs."""
        return [*([self.base] if self.base else []), *self.inputs]

    @property
    def pareto(self) -> bool:
        """Whether every set is an objective of its own."""
        return self.settings.objective == "pareto"

    @property
    def prunes(self) -> bool:
        """Whether trials may end early: not where a command decides as well."""
        return self.settings.pruning and not self.pareto and not self.judge.has_commands


def make_tune_plan(config: TuneConfig, settings: TuningSettings, merge: MergeOptions) -> TunePlan:
    """Check ``config`` and everything it names; reads headers, probes and data, loads no model.

    Raises:
        click.ClickException: the first thing that is wrong.
    """
    space, notes = config.space, []
    found = domains(space)
    candidates = Candidates(found)
    if settings.sampler == "cmaes" and (
        space.compares or not any(not one.choices for one in _all(found))
    ):
        raise InputError(
            "sampler: cmaes searches ranges of one method: use tpe for methods or choices alone"
        )
    defaults = default_points(space, found)
    first, budget = defaults, settings.trials
    if settings.sampler == "grid":
        first = grid(candidates, settings.trials)
        budget = len(first)
    quests = [Quest("tune", space, candidates, first, budget)]
    for key in ("dtype", "out_dtype"):
        check_dtype(key, space.document.get(key))
    base, inputs = _models(space.document)
    contents = {name: describe(name) for name in [*([base] if base else []), *inputs]}
    if settings.baseline:
        plain = baseline_document(space.document, BASELINE_WEIGHTS)
        if plain is None:
            notes.append("no baseline: task arithmetic needs base_model and models")
        else:
            quests.insert(0, _baseline(plain))
    choose_device(merge.device or "cpu")
    for quest in quests:
        planned = [*quest.first[:4], *corners(quest.candidates.methods)]
        check_by_planning(quest.space, planned, merge)
    check_weights(space, found)
    judges = [
        Judge(
            sets,
            [*([base] if base else []), *inputs],
            merge,
            device=merge.device or "cpu",
            dtype=settings.dtype,
            changes_tokens=any(k in space.document for k in ("tokenizer", "tokenizer_source")),
            where=f"tuning.{where}",
        )
        for sets, where in ((config.evaluation, "evaluation"), (config.test, "test"))
        if sets
    ]
    for judge in judges:
        for name, one in judge.sets.items():
            if isinstance(one, HeldOutSet):
                judge.heldout(name)
    if base is None:
        notes.append("no base_model: improvements are over the inputs' mean score")
    notes += _calibration_notes(config)
    test = judges[1] if len(judges) > 1 else None
    fingerprint = _fingerprint(config, settings, merge, judges[0], contents)
    return TunePlan(config, settings, quests, base, inputs, judges[0], test, fingerprint, notes)


def has_tokenizer(document: Mapping[str, Any], merge: MergeOptions) -> bool:
    """Say whether the model whose tokenizer mergekit copies has one."""
    base, inputs = _models(document)
    return load_own_tokenizer(base or inputs[0], merge.trust_remote_code) is not None


def _baseline(document: dict[str, Any]) -> Quest:
    space = find_space(document)
    candidates = Candidates(domains(space))
    points: list[Point] = [(space.methods[0], {"weight": weight}) for weight in BASELINE_WEIGHTS]
    return Quest("baseline", space, candidates, points, len(points))


def _all(found: Mapping[str, Mapping[str, Any]]) -> Iterable[Any]:
    return (domain for unknowns in found.values() for domain in unknowns.values())


def _models(document: Mapping[str, Any]) -> tuple[str | None, list[str]]:
    base = document.get("base_model")
    inputs = [name for name in dict.fromkeys(model_names(document)) if name != base]
    if not inputs:
        raise InputError("no model is merged: list them under models or slices")
    return base if isinstance(base, str) else None, inputs


def _calibration_notes(config: TuneConfig) -> list[str]:
    """Say which evaluation sets the statistics were measured on, or will be."""
    used: dict[str, str] = {}
    for name in _STATISTICS:
        for reference in _values(config.space.document, name):
            with section(name):
                data = open_statistics(reference).metadata.data
            for dataset in [data.dataset, *(one.dataset for one in data.mixture or [])]:
                used[_data_key(dataset)] = reference
    for key, settings in config.calibration.items():
        if isinstance(settings, Mapping) and isinstance(settings.get("dataset"), str):
            used.setdefault(_data_key(settings["dataset"]), str(key))
    return [
        f"{where}.{name} is judged on {one.dataset}, which {used[_data_key(one.dataset)]} was "
        "measured on: the merge has seen it"
        for where, sets in (("evaluation", config.evaluation), ("test", config.test))
        for name, one in sets.items()
        if isinstance(one, HeldOutSet) and _data_key(one.dataset) in used
    ]


def _values(node: Any, name: str) -> list[str]:
    found: list[str] = []
    if isinstance(node, Mapping):
        for key, value in node.items():
            choices = value.get(TUNE) if isinstance(value, Mapping) else [value]
            if key == name and isinstance(choices, list):
                found += [one for one in choices if isinstance(one, str)]
            else:
                found += _values(value, name)
    elif isinstance(node, list):
        for one in node:
            found += _values(one, name)
    return list(dict.fromkeys(found))


def _data_key(dataset: str) -> str:
    path = Path(dataset).expanduser()
    return str(path.resolve()) if path.exists() else dataset


def _fingerprint(
    config: TuneConfig,
    settings: TuningSettings,
    merge: MergeOptions,
    judge: Judge,
    contents: Mapping[str, Contents],
) -> dict[str, str]:
    """Return what must be equal for trials to be comparable; budget and sampler may change."""
    found = {key: json.dumps(value, sort_keys=True) for key, value in config.space.document.items()}
    found[METHOD] = ", ".join(config.space.methods)
    found["tuning.objective"] = settings.objective
    found["tuning.dtype"] = settings.dtype
    for name, one in config.evaluation.items():
        found[f"tuning.evaluation.{name}"] = _told(one)
        if isinstance(one, HeldOutSet):
            found[f"the tokens of {name}"] = judge.heldout(name).digest[:16]
    found |= decisive_options(merge)
    found |= {f"the weights of {model}": one.fingerprint for model, one in contents.items()}
    for reference in (one for key in _STATISTICS for one in _values(config.space.document, key)):
        digest = open_statistics(reference).metadata.digest
        found[f"the statistics {reference}"] = (digest or "")[:16]
    return found


def _told(one: EvaluationSet) -> str:
    told = one.model_dump(mode="json", exclude_defaults=True)
    for name in ("batch_size", "timeout"):  # how it is done, not what is asked
        told.pop(name, None)
    return json.dumps(told, sort_keys=True)
