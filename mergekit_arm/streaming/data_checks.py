"""What else can be refused before anything long begins: the data, ``keep``, the disk."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import torch
from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.reading import choose_tokenizer
from mergekit_arm.data.corpus import read_corpus
from mergekit_arm.errors import did_you_mean
from mergekit_arm.files import size_of
from mergekit_arm.machine import free_disk
from mergekit_arm.models.loading import choose_device, find_model
from mergekit_arm.sections import section
from mergekit_arm.streaming.judge import StepJudge
from mergekit_arm.streaming.options import Keep
from mergekit_arm.streaming.plan.checks import Checks
from mergekit_arm.streaming.plan.document import STEP_BYTES
from mergekit_arm.streaming.plan.plan import StreamPlan
from mergekit_arm.units import size_text


def make_judge(plan: StreamPlan, merge: MergeOptions) -> StepJudge | None:
    """Return what scores the stream's models, None without ``evaluation``."""
    if plan.config.evaluation is None:
        return None
    others = [checkpoint.reference for checkpoint in (plan.checkpoints or [])[:1]]
    return StepJudge(
        plan.config.evaluation,
        [plan.config.base_model, *others],
        merge,
        changes_tokens=plan.config.changes_tokens,
    )


def data_problems(plan: StreamPlan, judge: StepJudge | None, merge: MergeOptions) -> list[str]:
    """Tokenise the calibration and held-out data as the steps will; return what is wrong."""
    check = Checks()
    check.run(lambda: _check_calibration(plan, merge))
    check.run(lambda: _check_evaluation(plan, judge))
    return check.problems


def keep_problems(plan: StreamPlan | None, keep: str) -> list[str]:
    """Return what is wrong with ``keep``."""
    known = get_args(Keep)
    if keep not in known:
        return [f"keep must be {', '.join(known)}, not {keep!r}{did_you_mean(str(keep), known)}"]
    if plan is not None and keep == "best" and plan.config.evaluation is None:
        return ["--keep best: without evaluation no step is the best; use all or last"]
    return []


def disk_problems(plan: StreamPlan, out: Path, keep: Keep) -> list[str]:
    """Say if the disk cannot hold the stream; what ``out`` holds already counts as free."""
    needed = disk_needed(plan, keep)
    free = free_disk(out) + (size_of(out) if out.is_dir() else 0)
    if needed <= free:
        return []
    sizes = f"about {size_text(needed)} of disk and {size_text(free)} are free"
    return [f"{out}: the stream needs {sizes}: put OUT elsewhere, or use --keep last"]


def disk_needed(plan: StreamPlan, keep: Keep) -> int:
    """Return the bytes of weights at the peak: kept models in float32, one in progress, the final.

    An adapter's merged model counts once more. Statistics are left out.
    """
    evaluation = plan.config.evaluation
    models = 2 + (evaluation is not None and evaluation.keep == "best")
    if keep == "all" and plan.length is not None:
        models = max(models, plan.length)
    adapters = any("+" in checkpoint.reference for checkpoint in plan.checkpoints or [])
    final: torch.dtype = getattr(torch, plan.final_dtype)
    return plan.base.parameters * ((models + adapters) * STEP_BYTES + final.itemsize)


def _check_calibration(plan: StreamPlan, merge: MergeOptions) -> None:
    if plan.calibration is None:
        return
    # Without its adapter, which would be merged for nothing, and by a dry run into OUT.
    base = str(ModelReference.parse(plan.config.base_model).model)
    with find_model(base, trust_remote_code=merge.trust_remote_code), section("calibration"):
        for settings in plan.calibration.passes():
            options = CalibrationOptions(
                plan.config.base_model,
                out="",
                trust_remote_code=merge.trust_remote_code,
                **settings,
            )
            choose_device(options.device)
            read_corpus(options.data(), choose_tokenizer(options))


def _check_evaluation(plan: StreamPlan, judge: StepJudge | None) -> None:
    if judge is None:
        return
    with section("evaluation"):
        choose_device(judge.settings.device)
    # Under --watch the chat template may come with the first checkpoint.
    if judge.settings.dataset is not None and plan.checkpoints is not None:
        judge.heldout.scored_tokens  # noqa: B018  # reads the data
