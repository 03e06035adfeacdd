"""One step: measure, merge, compare, judge, and repeat with half the rate if it got worse.

Nothing here commits: what a step leaves in its directory counts once the stream has saved the
record that :func:`take_step` returns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_arm.files import remove, size_of, write_text
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.streaming.judge import Score
from mergekit_arm.streaming.layout import (
    CHECKPOINT_STATISTICS,
    METRICS,
    MODEL,
    PROVENANCE,
    STEP_CONFIG,
    STEP_STATISTICS,
    TASK_STATISTICS,
)
from mergekit_arm.streaming.plan.document import by_hand, step_document, to_yaml
from mergekit_arm.streaming.plan.plan import PlannedStep
from mergekit_arm.streaming.state import StepRecord
from mergekit_arm.streaming.step.measuring import Measurement, carry_over, measure_model, provenance
from mergekit_arm.streaming.step.merge import forgetting, merge, merge_adapter
from mergekit_arm.streaming.step.movement import measure_move
from mergekit_arm.streaming.step.workplace import Workplace

HALVINGS = 4
"""How often ``backtrack`` halves a step's learning rate before it gives the checkpoint up."""

_DEFAULT_SEED = 42


@dataclass
class _Clock:
    """Seconds of a step by what they went into."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begun
            self.seconds[part] = round(self.seconds.get(part, 0.0) + spent, 3)


def take_step(place: Workplace, planned: PlannedStep) -> StepRecord:
    """Do one step and return its record; nothing of it is committed yet.

    Whatever of it a killed run had finished (statistics, the merged model) is used again.
    Leaves the step's weights in its directory where the step was accepted.
    """
    state, folder, clock = place.state, place.folder(planned.step), _Clock()
    folder.mkdir(parents=True, exist_ok=True)
    merge_options = _options_of(place, planned.step)
    current, checkpoint = place.model_of(state.current), planned.checkpoint.reference
    with clock.time("calibrate"):
        own, task = _statistics(place, planned, current)
        others = _checkpoint_statistics(place, planned)
    with clock.time("evaluate"):
        latest = _score_checkpoint(place, checkpoint)
    rate, attempts, written = planned.rate, 0, 0
    while True:
        document = step_document(
            place.plan.config,
            place.plan.method,
            current=current,
            checkpoint=checkpoint,
            learning_rate=rate,
            statistics=own.path if own else None,
            task_statistics=task.path if task else None,
            checkpoint_statistics=others,
        )
        merged = str(folder / MODEL)
        with forgetting(
            [current, checkpoint, merged], [*(one.path for one in (own, task) if one), others]
        ):
            with clock.time("merge"):
                _merge_once(place, planned, document, merge_options)
            with clock.time("measure"):
                move = measure_move(document, merged, merge_options)
        written += size_of(folder / MODEL)
        with clock.time("evaluate"):
            score = place.score(merged)
        attempts += 1
        accepted = not _is_worse(place, score)
        if accepted or attempts > HALVINGS:
            break
        assert rate is not None  # the plan refuses to backtrack without one
        place.say(f"step {planned.step}: worse at learning rate {rate:g}; again with {rate / 2:g}")
        rate /= 2
    if not accepted:
        remove(folder / MODEL)
    record = StepRecord(
        step=planned.step,
        passed=planned.passed,
        checkpoint=planned.checkpoint.name,
        reference=checkpoint,
        learning_rate=rate,
        planned_rate=planned.rate,
        attempts=attempts,
        accepted=accepted,
        statistics_from=own.measured_at if own else None,
        calibration_tokens=sum(
            one.tokens for one in (own, task) if one and one.measured_at == planned.step
        ),
        rotation_degrees=move.rotation(),
        update_norm=move.update_norm,
        task_norm=move.task_norm,
        current=score if accepted else state.score_of(state.current),
        base=state.base or Score(),
        latest_checkpoint=latest,
        best_step=planned.step if accepted and _is_best(place, score) else state.best,
        seconds=clock.seconds,
        bytes=written,
    )
    details: dict[str, Any] = record.model_dump(mode="json")
    details["tensors"] = {name: asdict(one) for name, one in move.tensors.items()}
    write_text(folder / METRICS, json.dumps(details, indent=1) + "\n")
    if own is not None:
        facts = {**provenance(own), **({"task": provenance(task)} if task else {})}
        write_text(folder / PROVENANCE, json.dumps(facts, indent=1) + "\n")
    return record


def _options_of(place: Workplace, step: int) -> MergeOptions:
    # Methods with random masks would drop the same weights at every step with one seed.
    seed = place.merge.random_seed
    return place.merge.model_copy(
        update={
            "random_seed": (_DEFAULT_SEED if seed is None else seed) + step,
            # Calibration and evaluation need it, whatever the final model gets.
            "copy_tokenizer": place.plan.has_tokenizer,
            "safe_serialization": True,
        }
    )


def _statistics(
    place: Workplace, planned: PlannedStep, current: str
) -> tuple[Measurement | None, Measurement | None]:
    """Return the current model's statistics, and those of the task's text where there are such."""
    calibration = place.plan.calibration
    if calibration is None:
        return None, None
    if planned.measures:
        merge_adapter(current, place.merge)
    found: list[Measurement | None] = []
    for name, settings in zip(
        (STEP_STATISTICS, TASK_STATISTICS), calibration.passes(), strict=False
    ):
        out = place.folder(planned.step) / name
        if planned.measures:
            found.append(
                measure_model(
                    current,
                    out,
                    planned.step,
                    settings,
                    place.plan.method.statistics,
                    place.merge,
                    say=place.say,
                    progress=place.progress,
                )
            )
            continue
        last = place.state.steps[-1]
        assert last.statistics_from is not None
        earlier = place.folder(last.step) / name
        found.append(carry_over(earlier, last.statistics_from, Path(current), out))
    return found[0], found[1] if len(found) > 1 else None


def _checkpoint_statistics(place: Workplace, planned: PlannedStep) -> Path | None:
    if not place.plan.aligns or place.plan.calibration is None:
        return None
    merge_adapter(planned.checkpoint.reference, place.merge)
    out = place.folder(planned.step) / CHECKPOINT_STATISTICS
    return measure_model(
        planned.checkpoint.reference,
        out,
        planned.step,
        place.plan.calibration.settings,
        (SUBSPACE.name,),
        place.merge,
        say=place.say,
        progress=place.progress,
    ).path


def _merge_once(
    place: Workplace, planned: PlannedStep, document: dict[str, Any], options: MergeOptions
) -> None:
    """Merge into the step's directory, unless a killed run had finished this very merge."""
    folder = place.folder(planned.step)
    text = to_yaml(document, _comment(place, planned, document, options))
    config = folder / STEP_CONFIG
    if (folder / MODEL).is_dir():
        if config.is_file() and config.read_text(encoding="utf-8") == text:
            return
        remove(folder / MODEL)
    write_text(config, text)
    merge(document, text, folder / MODEL, options)


def _comment(
    place: Workplace, planned: PlannedStep, document: dict[str, Any], options: MergeOptions
) -> list[str]:
    lines = [
        f"Step {planned.step} of a stream: {planned.checkpoint.name} into the model so far.",
        f"By hand: {by_hand(place.folder(planned.step) / STEP_CONFIG, options, document)}",
    ]
    if place.keep != "all":
        lines.append(
            "Its inputs' weights and statistics are kept with --keep all; else make them again, "
            "step by step."
        )
    return lines


def _score_checkpoint(place: Workplace, reference: str) -> Score:
    """Return a checkpoint's loss; scored once, however often the stream passes over it."""
    merge_adapter(reference, place.merge)
    if reference not in place.state.scores:
        place.state.scores[reference] = place.score(reference, run_command=False)
    return place.state.scores[reference]


def _is_worse(place: Workplace, score: Score) -> bool:
    """Say whether a step made the model worse, where ``backtrack`` asks."""
    evaluation = place.plan.config.evaluation
    if evaluation is None or not evaluation.backtrack:
        return False
    return place.state.score_of(place.state.current).better_than(score, evaluation)


def _is_best(place: Workplace, score: Score) -> bool:
    """Say whether a step is better than all before it; without evaluation the last one is."""
    evaluation = place.plan.config.evaluation
    if evaluation is None:
        return True
    return score.better_than(place.state.score_of(place.state.best), evaluation)
