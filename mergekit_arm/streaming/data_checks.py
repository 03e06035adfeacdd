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
from mergekit_arm.judging.judge import Judge
from mergekit_arm.machine import free_disk
from mergekit_arm.models.loading import choose_device, find_model
from mergekit_arm.models.tensors import open_tensors
from mergekit_arm.sections import section
from mergekit_arm.statistics.read import open_statistics
from mergekit_arm.streaming.options import Keep
from mergekit_arm.streaming.plan.checks import Checks
from mergekit_arm.streaming.plan.document import STEP_BYTES
from mergekit_arm.streaming.plan.plan import StreamPlan
from mergekit_arm.units import size_text


def data_problems(plan: StreamPlan, judge: Judge | None, merge: MergeOptions) -> list[str]:
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
    groups = plan.checkpoints or []
    adapters = max((sum("+" in one.reference for one in group) for group in groups), default=0)
    final: torch.dtype = getattr(torch, plan.final_dtype)
    return plan.base.parameters * ((models + adapters) * STEP_BYTES + final.itemsize)


def _check_calibration(plan: StreamPlan, merge: MergeOptions) -> None:
    if plan.calibration is None:
        return
    if plan.published:
        _check_published(plan)
        if plan.calibration.refresh == "once":
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


def _check_published(plan: StreamPlan) -> None:
    """Look at a few weights whether the statistics at hand are the base's."""
    base = ModelReference.parse(plan.config.base_model)
    if base.lora is not None or not Path(base.model.path).is_dir():
        return  # mergekit's planning of the first step looks at every weight
    tensors = open_tensors(base.model.path, Path(base.model.path))
    for key, reference in plan.published.items():
        with section(f"parameters: {key}"):
            matcher = open_statistics(reference).matcher
            known = [name for name in tensors.names if name in matcher.weights]
            for name in known[:: max(1, len(known) // 4)]:
                matcher.find(name, tensors.get(name))


def _check_evaluation(plan: StreamPlan, judge: Judge | None) -> None:
    if judge is None:
        return
    with section("evaluation"):
        choose_device(judge.device)
    # Under --watch the chat template may come with the first checkpoint.
    if plan.checkpoints is not None:
        judge.data()
