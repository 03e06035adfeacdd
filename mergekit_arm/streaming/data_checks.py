"""Read the data of a stream before anything long begins."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.reading import choose_tokenizer
from mergekit_arm.data.corpus import read_corpus
from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.files import size_of
from mergekit_arm.models.loading import (
    choose_device,
    find_model,
)
from mergekit_arm.streaming.config import section
from mergekit_arm.streaming.evaluation.score import Judge
from mergekit_arm.streaming.options import Keep
from mergekit_arm.streaming.plan.plan import Plan
from mergekit_arm.units import size_text


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
    options = CalibrationOptions(
        plan.config.base_model,
        out="",
        trust_remote_code=merge.trust_remote_code,
        **plan.calibration.settings,
    )
    # Without its adapter, which would be merged for nothing, and by a dry run into OUT.
    base = str(ModelReference.parse(plan.config.base_model).model)
    with find_model(base, trust_remote_code=merge.trust_remote_code), section("calibration"):
        choose_device(options.device)
        read_corpus(options.data(), choose_tokenizer(options))


def _check_evaluation(plan: Plan, judge: Judge | None) -> None:
    if judge is None:
        return
    with section("evaluation"):
        choose_device(judge.settings.device)
    # Under --watch the chat template may come with the first checkpoint.
    if judge.settings.dataset is not None and plan.checkpoints is not None:
        judge.heldout.scored_tokens  # noqa: B018  # reads the data


def keep_problems(plan: Plan | None, keep: str) -> list[str]:
    """Return what is wrong with ``keep``."""
    known = get_args(Keep)
    if keep not in known:
        return [f"keep must be {', '.join(known)}, not {keep!r}{did_you_mean(str(keep), known)}"]
    if plan is not None and keep == "best" and plan.config.evaluation is None:
        return ["--keep best: without evaluation no step is the best; use all or last"]
    return []


_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def check_disk(plan: Plan, out: Path, keep: Keep) -> None:
    """Refuse a stream that the disk cannot hold.

    Raises:
        InputError: too little space, counting what ``out`` holds already.
    """
    needed, free = disk_needed(plan, keep), _free(out) + (size_of(out) if out.is_dir() else 0)
    if needed > free:
        raise InputError(
            f"{out}: the stream needs about {size_text(needed)} of disk and {size_text(free)} are "
            "free: put OUT elsewhere, or use --keep last"
        )


def disk_needed(plan: Plan, keep: Keep) -> int:
    """Return the bytes of weights at the peak: kept models in float32, one in progress, the final.

    An adapter's merged model counts once more. Statistics are left out.
    """
    running = plan.base.parameters * _BYTES["float32"]
    evaluation = plan.config.evaluation
    models = 2 + (evaluation is not None and evaluation.keep == "best")
    if keep == "all" and plan.length is not None:
        models = max(models, plan.length)
    adapters = any("+" in checkpoint.reference for checkpoint in plan.checkpoints or [])
    final = plan.base.parameters * _BYTES[plan.final_dtype]
    return running * (models + adapters) + final


def _free(out: Path) -> int:
    return shutil.disk_usage(_existing(out)).free


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.is_dir())
