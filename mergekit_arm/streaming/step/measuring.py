"""The statistics of a step: measured on the current model, or those of an earlier one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_arm.calibration.calibrate import calibrate
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.merging.adapters import merge_adapter
from mergekit_arm.methods.arm import TASK
from mergekit_arm.methods.base import STATS
from mergekit_arm.sections import section
from mergekit_arm.statistics.format import METADATA_FILE
from mergekit_arm.statistics.locate import locate, read_metadata
from mergekit_arm.streaming.layout import (
    CHECKPOINT_STATISTICS,
    STEP_STATISTICS,
    TASK_STATISTICS,
)
from mergekit_arm.streaming.plan.document import StepStatistics
from mergekit_arm.streaming.plan.plan import PlannedStep
from mergekit_arm.streaming.step.workplace import Workplace


def step_statistics(
    place: Workplace, planned: PlannedStep, say: Callable[[str], None]
) -> tuple[StepStatistics, int | None, int]:
    """Return a step's statistics, the step whose starting model they are of, and tokens measured.

    What a killed run had measured is used again. Statistics of an earlier model stay as they
    were measured: the merge is told whose they are.

    Raises:
        InputError: what ``calibrate`` refuses.
    """
    calibration, step = place.plan.calibration, planned.step
    if calibration is None:
        return StepStatistics(), None, 0
    measured_at = step
    if not planned.measures and place.state.steps:
        measured_at = place.state.steps[-1].statistics_from or 1
    paths: dict[str, str] = {}
    tokens = 0
    if measured_at == 1 and place.plan.published:
        paths = {key: str(locate(one)) for key, one in place.plan.published.items()}
    passes = zip((STATS, TASK), (STEP_STATISTICS, TASK_STATISTICS), calibration.passes())  # noqa: B905
    for key, name, settings in passes:
        if key in paths:
            continue
        out = place.folder(measured_at) / name
        if not (out / METADATA_FILE).is_file():
            # Of a stream whose statistics are gone, the model that was measured may be there.
            measure(place, place.started_from(measured_at), out, settings, say=say)
        paths[key] = str(out)
        tokens += _tokens(out) if measured_at == step else 0
    others = []
    if place.plan.aligns:
        for index, one in enumerate(planned.checkpoints):
            suffix = f"_{index + 1}" if index else ""
            out = place.folder(step) / f"{CHECKPOINT_STATISTICS}{suffix}"
            kinds = place.plan.method.only_subspaces
            measure(place, one.reference, out, calibration.settings, kinds, say=say)
            others.append(str(out))
    earlier = None
    if measured_at != step:
        earlier = read_metadata(paths[STATS], Path(paths[STATS])).model.content_hash
    found = StepStatistics(paths[STATS], paths.get(TASK), tuple(others), earlier)
    return found, measured_at, tokens


def measure(
    place: Workplace,
    model: str,
    out: Path,
    settings: dict[str, Any],
    statistics: tuple[str, ...] | None = None,
    *,
    say: Callable[[str], None],
) -> None:
    """Calibrate ``model`` into ``out``, or find it done there already.

    Raises:
        InputError: what ``calibrate`` refuses.
    """
    if (out / METADATA_FILE).is_file():
        return
    merge_adapter(model, place.merge)
    options = CalibrationOptions(
        model=model,
        out=str(out),
        statistics=statistics or place.plan.method.statistics,
        trust_remote_code=place.merge.trust_remote_code,
        lora_merge_cache=place.merge.lora_merge_cache,
        **settings,
    )
    with section("calibration"):
        calibrate(options, place.progress, say)


def provenance(statistics: StepStatistics, measured_at: int) -> str:
    """Return as JSON what the numbers were measured on and with, without the list of weights."""
    found: dict[str, Any] = {"measured_on": f"step {measured_at - 1}"}
    for key, path in (("", statistics.current), ("task", statistics.task)):
        if path is not None:
            facts = read_metadata(path, Path(path)).model_dump(
                mode="json",
                include={"model", "data", "settings", "versions"},
                exclude_none=True,
            )
            found |= {key: facts} if key else facts
    return json.dumps(found, indent=1) + "\n"


def _tokens(out: Path) -> int:
    return read_metadata(str(out), out).data.tokens
