"""What is merged is the beginning of what is to be merged: then a stream goes on.

Checkpoints may have been added since, those that are merged may be gone, and how a stream is
judged, stopped and kept may change. What may not change is what the steps were made of.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_arm.errors import InputError
from mergekit_arm.models.contents import Contents, describe
from mergekit_arm.models.references import plain_path
from mergekit_arm.outputs import difference
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.rates import Schedule
from mergekit_arm.streaming.state import MergedCheckpoint, Skipped, State, StepRecord
from mergekit_arm.streaming.training.checkpoints import (
    Group,
    RunCheckpoint,
    find_checkpoints,
    listed_checkpoint,
    no_checkpoint,
    number_of,
    reached,
)

if TYPE_CHECKING:
    from mergekit_arm.streaming.plan.plan import PlannedStep


def list_checkpoints(
    config: StreamConfig, state: State | None, say: Callable[[str], None]
) -> list[Group]:
    """Return what one pass merges: the list of the file, or what its directory holds and held.

    Raises:
        InputError: there is none, or something that is not a model.
    """
    setting, base = config.checkpoints, config.base_model
    if isinstance(setting, list):
        groups = [one if isinstance(one, list) else [one] for one in setting]
        return [tuple(listed_checkpoint(one, base) for one in group) for group in groups]
    found = {one[0].name: one for one in find_checkpoints(Path(plain_path(setting)), base, say)}
    handled = state.handled if state else []
    last = reached(state)
    names = [one.checkpoint for one in handled]
    for name in list(found):
        if config.passes == 1 and name not in names and number_of(name) < last:
            say(f"{name} is left out: a later checkpoint, checkpoint-{last}, is merged already")
            del found[name]
    for name in names:
        found.setdefault(name, (RunCheckpoint(name, plain_path(Path(setting) / name)),))
    if not found:
        raise no_checkpoint(setting)
    return [found[name] for name in sorted(found, key=number_of)]


def check_prefix(
    fingerprint: Mapping[str, str],
    planned: Sequence[PlannedStep],
    config: StreamConfig,
    state: State,
) -> None:
    """Refuse a configuration of which ``state`` is not the beginning.

    ``planned``: all steps from the first on; empty under ``--watch``, where they are not known.

    Raises:
        InputError: the first difference, and what to do.
    """
    change = difference(state.fingerprint, fingerprint)
    for one in () if change or not planned else state.handled:
        if one.position >= len(planned):
            change = f"{one.checkpoint} is merged, and is not among the checkpoints any more"
        else:
            change = _changed(one, planned[one.position], config)
        if change:
            break
    if change:
        raise InputError(f"OUT holds another stream: {change}; put it back, or give another OUT")


def _changed(one: StepRecord | Skipped, now: PlannedStep, config: StreamConfig) -> str | None:
    if isinstance(one, Skipped):
        if isinstance(config.checkpoints, str) and one.checkpoint != now.name:
            return f"{one.checkpoint} came in the place of {now.name}"
        return None
    listed = isinstance(config.checkpoints, list)
    for before, after in zip(one.merged, now.checkpoints, strict=False):
        own = (_part(before.reference), before.name)[not listed]
        if own != (_part(after.reference), after.name)[not listed]:
            return f"step {one.step} merged {before.name}, and would now merge {after.name}"
        problem = _other_content(before, after)
        if problem:
            return problem
    if len(one.merged) != len(now.checkpoints):
        return f"step {one.step} merged {one.checkpoint}, and would now merge {now.name}"
    if json.dumps(one.planned) != json.dumps(now.planned):
        rates = config.learning_rate
        ends = isinstance(rates, Schedule) and rates.steps is None
        return (
            f"learning_rate of step {one.step} was {json.dumps(one.planned)} and is now "
            f"{json.dumps(now.planned)}"
            + (" (a schedule without steps: N stretches over all checkpoints)" if ends else "")
        )
    return None


def _other_content(before: MergedCheckpoint, after: RunCheckpoint) -> str | None:
    try:
        now = describe(after.reference).fingerprint
    except InputError:
        return None  # it is gone, and merged
    if before.content in (None, now):
        return None
    return f"content of {before.name} was {str(before.content)[:16]} and is now {now[:16]}"


def _part(reference: str) -> str:
    """Return a reference's adapter, or its model; an adapter that is gone has lost its base."""
    return reference.rpartition("+")[2]


def same_shapes(checkpoint: RunCheckpoint, contents: Contents, base: Contents) -> None:
    """Refuse a checkpoint whose tensors have other shapes than the base's.

    Raises:
        InputError: naming the tensor.
    """
    common = [name for name in base.shapes if name in contents.shapes]
    if base.shapes and contents.shapes and not common:
        raise InputError(
            f"{checkpoint.name}: no tensor has a name that base_model's have: another architecture"
        )
    for name in common:
        if base.shapes[name] != contents.shapes[name]:
            raise InputError(
                f"{checkpoint.name}: {name} has shape {list(contents.shapes[name])}, base_model's "
                f"has {list(base.shapes[name])}: another model, or added tokens "
                "(then set tokenizer_source: base or union)"
            )
