"""What is merged is the beginning of what is to be merged: then a stream goes on.

Checkpoints may have been added since, those that are merged may be gone, and how a stream is
judged, stopped and kept may change. What may not change is what the steps were made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_arm.errors import InputError
from mergekit_arm.files import remove
from mergekit_arm.models.contents import describe, shortened
from mergekit_arm.outputs import difference
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.layout import STEPS
from mergekit_arm.streaming.rates import Schedule
from mergekit_arm.streaming.state import MergedCheckpoint, Skipped, State, StepRecord
from mergekit_arm.streaming.training.checkpoints import RunCheckpoint

if TYPE_CHECKING:
    from mergekit_arm.streaming.plan.plan import PlannedStep, StreamPlan


def check_prefix(plan: StreamPlan, state: State) -> None:
    """Refuse a plan of which ``state`` is not the beginning.

    Raises:
        InputError: the first difference, and what to do.
    """
    if not state.handled:
        return  # nothing is merged: the stream begins again with what its file says now
    change, planned = difference(state.fingerprint, plan.fingerprint), plan.steps()
    old, new = dict[str, str](), dict[str, str]()
    for one in state.handled if planned and not change else ():  # --watch does not know them yet
        if one.position < len(planned):
            _add_facts(old, new, one, planned[one.position], plan.config)
        elif state.skipped:  # it may be one of these that is gone, and those after it have moved
            names, number = ", ".join(one.checkpoint for one in state.skipped), len(state.handled)
            key = "how many checkpoints there are"
            old[key], new[key] = f"{number} with what was skipped ({names})", str(len(planned))
        else:
            old[one.checkpoint], new[one.checkpoint] = "among the checkpoints", "gone from them"
    change = change or difference(old, new)
    if change:
        raise InputError(f"OUT holds another stream: {change}; put it back, or give another OUT")


def begun(plan: StreamPlan, state: State | None, out: Path, say: Callable[[str], None]) -> State:
    """Return the state from which a stream in ``out`` goes on.

    One that has merged nothing may have become another since: it begins again, with the
    measurement that is there already where that would be made alike.
    """
    if state is not None and (state.handled or state.fingerprint == plan.fingerprint):
        return state
    if state is not None:
        change = difference(state.fingerprint, plan.fingerprint)
        say(f"nothing was merged yet, and the stream begins again: {change}")
        old, new = (
            {key: value for key, value in one.items() if key not in ("parameters", "checkpoints")}
            for one in (state.fingerprint, plan.fingerprint)
        )
        if old != new:
            remove(out / STEPS)
    return State(fingerprint=plan.fingerprint)


def _add_facts(
    old: dict[str, str],
    new: dict[str, str],
    one: StepRecord | Skipped,
    coming: PlannedStep,
    config: StreamConfig,
) -> None:
    """Add what ``one`` was made of to ``old``, and what would be merged now to ``new``."""
    listed = isinstance(config.checkpoints, list)
    if isinstance(one, Skipped):
        if not listed:
            place = f"checkpoint {one.position + 1}"
            old[place], new[place] = one.checkpoint, coming.name
        return
    place = f"what step {one.step} merges"
    old[place], new[place] = _told(one.merged, listed), _told(coming.checkpoints, listed)
    for before, after in zip(one.merged, coming.checkpoints, strict=False):
        with suppress(InputError):  # it is gone, and merged
            content = f"content of {before.name}"
            now = shortened(describe(after.reference).fingerprint)
            old[content], new[content] = shortened(before.content or now), now
    rate, rates = f"learning_rate of step {one.step}", config.learning_rate
    old[rate], new[rate] = json.dumps(one.planned), json.dumps(coming.planned)
    if old[rate] != new[rate] and isinstance(rates, Schedule) and rates.steps is None:
        new[rate] += " (a schedule without steps: N stretches over all checkpoints)"


def _told(merged: Sequence[MergedCheckpoint | RunCheckpoint], listed: bool) -> str:
    """Return checkpoints by what recognises them: where they lie, or their name in a directory.

    Of a reference its adapter, where it has one: an adapter that is gone has lost its base.
    """
    return " + ".join(one.reference.rpartition("+")[2] if listed else one.name for one in merged)
