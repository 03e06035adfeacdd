"""Read the data of a stream before anything long begins."""

from __future__ import annotations

from collections.abc import Callable

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_arm.calibration.corpus import build_corpus
from mergekit_arm.calibration.model import choose_device, find_model
from mergekit_arm.calibration.rows import load_rows
from mergekit_arm.errors import InputError
from mergekit_arm.streaming.models import load_own_tokenizer
from mergekit_arm.streaming.plan import Plan
from mergekit_arm.streaming.scoring import Judge
from mergekit_arm.streaming.sections import section


def make_judge(plan: Plan, merge: MergeOptions) -> Judge | None:
    """Return what scores the stream's models, None without ``evaluation``."""
    if plan.config.evaluation is None:
        return None
    others = [checkpoint.reference for checkpoint in (plan.checkpoints or [])[:1]]
    changes = plan.config.tokenizer is not None or plan.config.tokenizer_source is not None
    references = [plan.config.base_model, *others]
    return Judge(plan.config.evaluation, references, merge, changes_tokens=changes)


def data_problems(plan: Plan, judge: Judge | None, merge: MergeOptions) -> list[str]:
    """Tokenise the calibration and held-out data as the steps will; return what is wrong."""
    problems: list[str] = []
    for check in (lambda: _check_calibration(plan, merge), lambda: _check_evaluation(plan, judge)):
        _collect(check, problems)
    return problems


def _collect(check: Callable[[], None], problems: list[str]) -> None:
    try:
        check()
    except InputError as error:
        problems.append(error.message)


def _check_calibration(plan: Plan, merge: MergeOptions) -> None:
    if plan.calibration is None:
        return
    settings = plan.calibration.settings
    # Without its adapter, which would be merged for nothing, and by a dry run into OUT.
    base = str(ModelReference.parse(plan.config.base_model).model)
    with find_model(base, trust_remote_code=merge.trust_remote_code):
        tokenizer = load_own_tokenizer(plan.config.base_model, merge.trust_remote_code)
    with section("calibration"):
        choose_device(settings["device"])
        rows, split = load_rows(settings["dataset"], settings["subset"], settings["split"])
        if len(rows) == 0:
            raise InputError(f"data set {settings['dataset']!r} is empty")
        build_corpus(
            rows,
            tokenizer,
            split=split,
            column=settings["text_column"],
            samples=settings["samples"],
            sequence_length=settings["sequence_length"],
            seed=settings["seed"],
        )


def _check_evaluation(plan: Plan, judge: Judge | None) -> None:
    if judge is None:
        return
    with section("evaluation"):
        choose_device(judge.settings.device)
    # Under --watch the chat template may come with the first checkpoint.
    if judge.settings.dataset is not None and plan.checkpoints is not None:
        judge.heldout.scored_tokens  # noqa: B018  # reads the data
