"""The scores of base, inputs and trials, in shares of the data."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_arm.errors import InputError
from mergekit_arm.files import scratch_at
from mergekit_arm.judging.judge import Judge, Scores, empty_cache
from mergekit_arm.merging.adapters import merge_adapter
from mergekit_arm.tuning.objective import Yardstick, yardstick
from mergekit_arm.tuning.plan import TunePlan
from mergekit_arm.tuning.scoring import OnTokens, ShareScorer
from mergekit_arm.tuning.state import TuneState

Told = Callable[[str, int, int], None]
"""Called with what is scored, and with scored tokens so far and in all."""


def score_reference(
    judge: Judge, reference: str, merge: MergeOptions, scratch: Path, on_tokens: OnTokens | None
) -> list[Scores]:
    """Return a model's scores after each share of the data; the last are over all of it.

    Commands are run once, and count in the last alone.

    Raises:
        InputError: a score that is not finite.
    """
    model = merge_adapter(reference, merge)
    shares: list[Scores] = [{}]
    if judge.has_data:
        shares = _losses(judge, model, on_tokens)
    if judge.has_commands:
        with scratch_at(scratch) as empty:
            found = judge.score(model, empty, losses=False)
        shares[-1] = {name: (shares[-1] | found)[name] for name in judge.sets}
    for name, score in shares[-1].items():
        if not math.isfinite(score):
            raise InputError(
                f"{judge.place(name)}: the score of {reference} is {score}, so that nothing can "
                "be compared with it: the model is broken, or too wide for this dtype"
            )
    return shares


def _losses(judge: Judge, reference: str, on_tokens: OnTokens | None) -> list[Scores]:
    model = judge.load(reference)
    found = list(ShareScorer(judge).losses(model, on_tokens))
    device = model.device
    del model
    gc.collect()
    empty_cache(device)
    return found


def measure_references(
    plan: TunePlan, merge: MergeOptions, out: Path, state: TuneState, scratch: Path, tell: Told
) -> list[Yardstick]:
    """Score the base and every input that ``state`` does not hold yet; each is saved at once.

    Returns the measure after each share of the data; the last is over all of it.
    """
    for reference in plan.references:
        if reference in state.scores:
            continue
        shares = score_reference(
            plan.judge,
            reference,
            merge,
            scratch,
            lambda done, total, name=reference: tell(name, done, total),  # type: ignore[misc]
        )
        state.scores[reference], state.shares[reference] = shares[-1], shares
        state.save(out)
    count = len(state.shares[plan.references[0]])
    return [_measure_at(plan, state, share) for share in range(count)]


def _measure_at(plan: TunePlan, state: TuneState, share: int) -> Yardstick:
    def scores(reference: str) -> Scores:
        return state.shares[reference][share]

    sets = {name: plan.judge.sets[name] for name in scores(plan.inputs[0])}
    base = scores(plan.base) if plan.base else None
    return yardstick(sets, base, [scores(reference) for reference in plan.inputs])
