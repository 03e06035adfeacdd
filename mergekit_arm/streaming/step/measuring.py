"""The statistics of a step: measured on the current model, or those of an earlier one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit_arm.calibration.calibrate import calibrate
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.merging.adapters import merge_adapter
from mergekit_arm.methods.arm import TASK
from mergekit_arm.methods.base import STATS
from mergekit_arm.methods.parameters import MEASURED_ON
from mergekit_arm.sections import section
from mergekit_arm.statistics.format import METADATA_FILE, Metadata
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.statistics.locate import locate, read_metadata
from mergekit_arm.streaming.layout import CHECKPOINT_STATISTICS, STEP_STATISTICS, TASK_STATISTICS
from mergekit_arm.streaming.plan.plan import PlannedStep
from mergekit_arm.streaming.step.workplace import Workplace


@dataclass(frozen=True)
class StepStatistics:
    """A step's statistics, as its merge is told of them."""

    shared: dict[str, str] = field(default_factory=dict)
    """Parameters of the merge: where the statistics of the current model are, or of an earlier
    one, whose content hash is then ``measured_on``."""
    own: list[str] = field(default_factory=list)
    """Where those of each checkpoint are, if they are measured."""
    step: int | None = None
    """The step whose starting model was measured."""
    tokens: int = 0
    """Measured for this step; 0 where earlier statistics served."""


def measure_step(place: Workplace, planned: PlannedStep) -> StepStatistics:
    """Return a step's statistics, measured where they are not there yet.

    What a killed run had measured is used again. Statistics of an earlier model stay as they
    were measured: the merge is told whose they are.

    Raises:
        InputError: what ``calibrate`` refuses.
    """
    calibration, step, shared = place.plan.calibration, planned.step, dict[str, str]()
    if calibration is None:
        return StepStatistics()
    at = step
    if not planned.measures and place.state.steps:
        at = place.state.steps[-1].statistics_from or 1
    tokens = 0
    if at == 1:
        shared = {key: str(locate(one)) for key, one in place.plan.published.items()}
    passes = zip((STATS, TASK), (STEP_STATISTICS, TASK_STATISTICS), calibration.passes())  # noqa: B905
    for key, name, settings in passes:
        if key not in shared:
            shared[key] = _measure(place, at, name, settings)
            tokens += _metadata(shared[key]).data.tokens if at == step else 0
    if at != step:
        shared[MEASURED_ON] = _metadata(shared[STATS]).model.content_hash
    own = []
    for index, one in enumerate(planned.checkpoints if place.plan.aligns else ()):
        name = f"{CHECKPOINT_STATISTICS}_{index + 1}" if index else CHECKPOINT_STATISTICS
        own.append(_measure(place, step, name, calibration.settings, one.reference))
    return StepStatistics(shared, own, at, tokens)


def _measure(
    place: Workplace,
    step: int,
    name: str,
    settings: dict[str, Any],
    checkpoint: str | None = None,
) -> str:
    """Return the directory ``name`` of ``step``, with the statistics of a checkpoint.

    By default of the model from which the step started. It may have been measured already.
    """
    out = place.folder(step) / name
    if not (out / METADATA_FILE).is_file():
        # Of a stream whose statistics are gone, the model that was measured may be there.
        model = checkpoint or place.needed(place.state.before(step))
        merge_adapter(model, place.merge)
        options = CalibrationOptions(
            model=model,
            out=str(out),
            statistics=(SUBSPACE.name,) if checkpoint else place.plan.method.statistics,
            trust_remote_code=place.merge.trust_remote_code,
            lora_merge_cache=place.merge.lora_merge_cache,
            **settings,
        )
        with section("calibration"):
            calibrate(options, place.progress, place.say)
    return str(out)


def provenance(measured: StepStatistics) -> str:
    """Return as JSON what the numbers were measured on and with, without the list of weights."""
    found: dict[str, Any] = {"measured_on": f"step {(measured.step or 1) - 1}"}
    told = {"model", "data", "settings", "versions"}
    for key, path in measured.shared.items():
        if key != MEASURED_ON:
            facts = _metadata(path).model_dump(mode="json", include=told, exclude_none=True)
            found |= {"task": facts} if key == TASK else facts
    return json.dumps(found, indent=1) + "\n"


def _metadata(path: str) -> Metadata:
    return read_metadata(path, Path(path))
