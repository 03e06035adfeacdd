"""What judges a stream's models, and what their scores depend on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from mergekit.options import MergeOptions

from mergekit_arm.judging.judge import Judge, Progress
from mergekit_arm.streaming.layout import METRIC_LOG, MODEL, STEPS
from mergekit_arm.streaming.plan.plan import StreamPlan, content_of
from mergekit_arm.streaming.state import State


def judged_by(plan: StreamPlan) -> dict[str, str]:
    """Return what every score of a stream depends on."""
    evaluation = plan.config.evaluation
    if evaluation is None:
        return {}
    found = {"device and dtype": f"{evaluation.device} {evaluation.dtype}"}
    for name, one in evaluation.sets.items():
        left_out = {"weight", "at_most", "batch_size", "goal", "timeout"}
        found[name] = json.dumps(one.model_dump(mode="json", exclude=left_out), sort_keys=True)
        content = content_of(getattr(one, "dataset", None))
        if content:
            found[f"content of the {name} data"] = content
    return found


def make_judge(
    plan: StreamPlan,
    merge: MergeOptions,
    out: Path,
    state: State | None,
    say: Callable[[str], None] | None,
    progress: Progress | None,
) -> Judge | None:
    """Return what scores the stream's models, None without ``evaluation``.

    What a command prints, ``say`` receives; it is in ``metric.log`` in ``out``, too.
    """
    evaluation = plan.config.evaluation
    if evaluation is None:
        return None
    # Their chat template may stand in for the base's.
    steps = (out / STEPS / f"{one.step:03d}" / MODEL for one in (state.steps if state else []))
    made = [str(one) for one in steps if one.is_dir()][:1]
    first = [one.reference for one in (plan.checkpoints or [()])[0]]
    return Judge(
        evaluation.sets,
        [plan.config.base_model, *made, *first],
        merge,
        evaluation.device,
        evaluation.dtype,
        plan.config.changes_tokens,
        named=evaluation.named,
        say=say,
        log=out / METRIC_LOG,
        progress=progress,
    )
