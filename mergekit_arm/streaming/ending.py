"""The end of a stream: the final model, the average it is compared with, card and picture."""

from __future__ import annotations

import json
from pathlib import Path

from mergekit_arm.errors import Failure, InputError
from mergekit_arm.files import remove, write_text
from mergekit_arm.judging.judge import Scores
from mergekit_arm.merging.adapters import merge_adapter
from mergekit_arm.merging.documents import to_yaml
from mergekit_arm.merging.merge import forgetting, merge
from mergekit_arm.merging.options import LORA_CACHE
from mergekit_arm.models.contents import describe, is_there
from mergekit_arm.models.references import plain_path
from mergekit_arm.streaming.layout import (
    AVERAGE,
    CARD,
    INCOMING,
    METRIC_LOG,
    MODEL,
    PLOT,
    PROVENANCE,
)
from mergekit_arm.streaming.plan.document import average_document, cast_document
from mergekit_arm.streaming.report.card import stream_card
from mergekit_arm.streaming.report.plot import draw_stream
from mergekit_arm.streaming.state import AverageScores, MergedCheckpoint
from mergekit_arm.streaming.step.workplace import Workplace


def finish(place: Workplace, reason: str) -> int:
    """Make ``OUT/model`` of the chosen step, unless it lies there, and return that step."""
    state, chosen = place.state, place.chosen
    if chosen == 0:
        place.say("no step was better than the base: the final model is the base")
    _make_model(place, chosen)
    judge, compare = place.judge, place.plan.config.compare
    if compare.average and judge and (judge.has_data or compare.commands):
        _average(place)
    # A finished model is published as it lies there: nothing half-written goes into it.
    facts = place.folder(chosen or len(state.steps)) / PROVENANCE
    measured = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else None
    card = stream_card(place.plan, state, chosen, measured)
    write_text(place.out / MODEL / CARD, card, staging=place.out)
    draw_stream(state, place.plan.config.evaluation, place.out / PLOT)
    if state.chosen is None:
        place.prune(finished=True)
    for name in (INCOMING, LORA_CACHE, METRIC_LOG):
        remove(place.out / name)
    state.chosen, state.stopped = chosen, reason
    state.save(place.out)
    return chosen


def _make_model(place: Workplace, chosen: int) -> None:
    state, model, source = place.state, place.out / MODEL, place.model_of(chosen)
    copies = place.merge.copy_tokenizer and place.plan.has_tokenizer
    options = place.merge.model_copy(update={"copy_tokenizer": copies})
    document = cast_document(source, place.plan.final_dtype)
    if state.chat_template is not None:
        document["chat_template"] = state.chat_template
    text = to_yaml(document)
    made = f"{text}{options.out_shard_size} {options.safe_serialization}"
    if model.is_dir() and state.final == made:
        return
    if not place.has(chosen):
        raise InputError(
            f"{place.out}: step {chosen} would become the model, and its float32 weights are gone; "
            "evaluation.keep: last makes it of the last step; --keep all, from a stream's "
            "beginning, keeps all of them"
        )
    if state.final is not None and model.is_dir():
        place.say(f"{model} is replaced: it becomes step {chosen} in {place.plan.final_dtype}")
    merge_adapter(source, options)
    with forgetting([source]):
        merge(document, text, model, options)
    state.final = made
    state.save(place.out)


def _average(place: Workplace) -> None:
    """Score the uniform average of the merged checkpoints, once for so many steps."""
    state = place.state
    if state.average is not None and state.average.steps == len(state.steps):
        return
    state.average = AverageScores(steps=len(state.steps))
    merged = [_lies_at(place, one) for record in state.steps for one in record.merged]
    try:
        state.average.scores = _score_average(place, list(dict.fromkeys(merged)))
    except Failure as error:  # it is there to be looked at: the stream does not depend on it
        state.average.missing = error.message
        place.say(f"the uniform average is not scored: {error.message}")
    finally:
        remove(place.out / AVERAGE)


def _lies_at(place: Workplace, one: MergedCheckpoint) -> str:
    """Return where a checkpoint lies: one that was taken from a run may still be there alone."""
    run = place.plan.config.checkpoints
    if is_there(one.reference) or not isinstance(run, str):
        return one.reference
    there = str(Path(plain_path(run)) / one.name)
    same = is_there(there) and describe(there).fingerprint == one.content
    return there if same else one.reference


def _score_average(place: Workplace, references: list[str]) -> Scores:
    """Merge and score the average of these models.

    Raises:
        Failure: it cannot be had.
    """
    if len(references) < 2:
        raise Failure("a single checkpoint was merged")
    if place.plan.config.changes_tokens:
        raise Failure("the merges change the tokens")
    if not all(map(is_there, references)):
        raise Failure("not all of the checkpoints are there any more")
    for reference in references:
        merge_adapter(reference, place.merge)
    document, model = average_document(references), place.out / AVERAGE
    options = place.merge.model_copy(update={"copy_tokenizer": place.plan.has_tokenizer})
    with forgetting([*references, str(model)]):
        merge(document, to_yaml(document), model, options)
    return place.score_aside(str(model))
