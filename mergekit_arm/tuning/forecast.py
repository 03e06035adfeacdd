"""The dry run of a search: what it will try, how long that takes, and how much disk."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_arm.judging.heldout import HeldOut
from mergekit_arm.judging.loss import mean_loss
from mergekit_arm.judging.sets import HeldOutSet
from mergekit_arm.machine import free_disk
from mergekit_arm.models.tensors import open_tensors
from mergekit_arm.tuning.plan import TunePlan
from mergekit_arm.tuning.search import Search
from mergekit_arm.tuning.trials import TrialRecord, records

_TIMED = 4  # sequences of every set that a dry run scores


@dataclass(frozen=True)
class TuneForecast:
    """What ``--dry-run`` prints beside the space."""

    models: int
    """Trials, baseline, base and inputs: what will be scored, of which ``done`` are."""
    done: int
    tokens: int
    """Scored tokens of all sets, of one model."""
    seconds: float | None
    """For one model: a trial's, or the base's on a few sequences and without a merge; None where
    only commands judge, and none has run yet."""
    by_trials: bool
    """Whether trials were timed, merges with them."""
    disk: int | None
    """Bytes; None for models that are not here yet."""
    disk_free: int


def forecast_tuning(
    plan: TunePlan, out: Path, merge: MergeOptions, *, with_model: bool
) -> TuneForecast:
    """Forecast a search. Loads the base and scores a little of it; leaves no file."""
    found = _trials(plan, out)
    ended = [one for one in found if one.seconds]
    count = sum(quest.budget for quest in plan.quests) + len(plan.references)
    if ended:
        seconds: float | None = sum(one.seconds["all"] for one in ended) / len(ended)
    else:
        seconds = _time_base(plan)
    return TuneForecast(
        models=count,
        done=len(ended),
        tokens=sum(plan.judge.heldout(name).scored_tokens for name in _data(plan)),
        seconds=seconds,
        by_trials=bool(ended),
        disk=_disk(plan, with_model),
        disk_free=free_disk(out),
    )


def _trials(plan: TunePlan, out: Path) -> list[TrialRecord]:
    if not (out / "study.db").is_file():
        return []
    return [
        one
        for quest in plan.quests
        for one in records(Search(out, quest.name, quest.candidates, objectives=_objectives(plan)))
    ]


def _objectives(plan: TunePlan) -> int:
    return len(plan.judge.sets) if plan.pareto else 1


def _data(plan: TunePlan) -> list[str]:
    return [name for name, one in plan.judge.sets.items() if isinstance(one, HeldOutSet)]


def _time_base(plan: TunePlan) -> float | None:
    """Return the seconds that all the data takes, by a few sequences of it."""
    if not plan.judge.has_data:
        return None
    model = plan.judge.load(plan.references[0])
    seconds = 0.0
    for name in _data(plan):
        held = plan.judge.heldout(name)
        few = HeldOut(held.sequences[:_TIMED], held.answers_only)
        begun = time.perf_counter()
        mean_loss(model, few, plan.judge.sets[name].batch_size)  # type: ignore[union-attr]
        share = sum(len(one.ids) for one in few.sequences) / sum(
            len(one.ids) for one in held.sequences
        )
        seconds += (time.perf_counter() - begun) / share
    return seconds


def _disk(plan: TunePlan, with_model: bool) -> int | None:
    """Return the bytes of a trial's merged model and of the best one, in the merge's dtype."""
    reference = ModelReference.parse(plan.references[0])
    folder = Path(reference.model.path)
    if not folder.is_dir():
        return None
    document = plan.quest.space.document
    name = document.get("out_dtype") or document.get("dtype")
    dtype = getattr(torch, str(name), torch.float32)
    return (1 + with_model) * open_tensors(str(folder), folder).size(dtype)
