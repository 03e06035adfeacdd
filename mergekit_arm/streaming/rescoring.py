"""Scores a stream's models again where the judge has changed since."""

from __future__ import annotations

import json

from mergekit_arm.models.contents import is_there
from mergekit_arm.outputs import difference
from mergekit_arm.streaming.plan.plan import StreamPlan, contents_of
from mergekit_arm.streaming.step.workplace import Workplace


def _judged_by(plan: StreamPlan) -> dict[str, str]:
    """Return what every score of a stream depends on."""
    evaluation = plan.config.evaluation
    if evaluation is None:
        return {}
    found = {"device and dtype": f"{evaluation.device} {evaluation.dtype}"}
    left_out = {"weight", "at_most", "batch_size", "goal", "timeout"}
    for name, one in evaluation.sets.items():
        found[name] = json.dumps(one.model_dump(mode="json", exclude=left_out), sort_keys=True)
    sets = evaluation.sets.items()
    return found | contents_of({name: getattr(one, "dataset", None) for name, one in sets})


def score_again(place: Workplace) -> None:
    """Bring all scores of the state to those of the plan's judge, and the best step with them.

    Models whose weights are gone have no score any more, and cannot be the best; it is said.
    """
    state, judge = place.state, _judged_by(place.plan)
    changed = difference(state.judge, judge) if state.base is not None else None
    state.judge = judge
    if changed:
        place.say(f"the judge has changed ({changed}): scoring again what is there")
        state.base, state.tried, state.average = place.score(place.plan.config.base_model), [], None
        state.data = place.judge.data() if place.judge is not None else {}
        lost = []
        for record in state.steps:
            record.base = state.base
            for one in record.merged:
                there = place.plan.config.compare.checkpoints and is_there(one.reference)
                one.scores = place.score_aside(one.reference) if there else {}
            if not record.accepted:
                record.current = state.scores_of(state.before(record.step))
            elif place.has(record.step):
                record.current = place.score(place.model_of(record.step))
            else:
                record.current = {}
                lost.append(str(record.step))
        if lost and place.judge is not None:
            place.say(f"steps without weights have no score any more: {', '.join(lost)}")
    best = 0
    for record in state.steps:  # what is the best may also have changed without a new score
        if record.accepted and place.better(record.current, state.scores_of(best)):
            best = record.step
        record.best_step = best
