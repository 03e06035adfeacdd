"""Everything about a stream that can be known before its first step."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.files import hash_file
from mergekit_arm.models.contents import Contents, describe
from mergekit_arm.models.loading import choose_device
from mergekit_arm.models.tokenizer import load_own_tokenizer
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.streaming.calibration import Calibration
from mergekit_arm.streaming.config import FINAL_DTYPES, StreamConfig
from mergekit_arm.streaming.options import WatchOptions
from mergekit_arm.streaming.plan.checks import (
    Checks,
    adapter_note,
    check_chat_template,
    check_parameters,
    check_watched,
    choose_calibration,
    choose_rates,
    leaves,
    same_shapes,
)
from mergekit_arm.streaming.plan.method import StepMethod, fit_method
from mergekit_arm.streaming.plan.schedule import Rates, rate_at
from mergekit_arm.streaming.references import absolute_reference
from mergekit_arm.streaming.training.checkpoints import RunCheckpoint, find_checkpoints

_DECISIVE_OPTIONS = (
    "random_seed",
    "lora_merge_dtype",
    "allow_crimes",
    "unsafe_truncate_embeddings",
    "out_shard_size",
    "safe_serialization",
)
"""Options of mergekit that change what a stream writes, and not only how fast."""


@dataclass(frozen=True)
class PlannedStep:
    """One step to come."""

    step: int
    passed: int
    checkpoint: RunCheckpoint
    rate: float | None
    measures: bool
    """Whether the model is calibrated before it."""


@dataclass(frozen=True)
class StreamPlan:
    """A stream whose configuration holds together."""

    config: StreamConfig
    """References absolute."""
    method: StepMethod
    rates: Rates | None
    """None where the method has no learning rate."""
    calibration: Calibration | None
    """None where the method reads no statistics."""
    aligns: bool
    """Whether the checkpoints are measured as well."""
    checkpoints: list[RunCheckpoint] | None
    """None under ``--watch``: they are not known yet."""
    fingerprint: dict[str, str]
    base: Contents
    final_dtype: str
    has_tokenizer: bool
    """Whether the base comes with one, for the steps to hand on."""
    notes: list[str] = field(default_factory=list)

    @property
    def length(self) -> int | None:
        """The number of steps, None where it is not known."""
        if self.checkpoints is None:
            return None
        return len(self.checkpoints) * self.config.passes

    def step(self, number: int, checkpoint: RunCheckpoint) -> PlannedStep | None:
        """Return step ``number`` (from 1), None past the end of a list of learning rates."""
        rate = None
        if self.rates is not None:
            rate = rate_at(self.rates, number - 1, self.length)
            if rate is None:
                return None
        count = len(self.checkpoints) if self.checkpoints is not None else 0
        return PlannedStep(
            number,
            (number - 1) // count + 1 if count else 1,
            checkpoint,
            rate,
            self.calibration is not None and self.calibration.due(number),
        )

    def steps(self) -> list[PlannedStep]:
        """Return all steps, where they are known."""
        checkpoints = (self.checkpoints or []) * self.config.passes
        planned = [self.step(i, checkpoint) for i, checkpoint in enumerate(checkpoints, start=1)]
        return [step for step in planned if step is not None]


def make_plan(
    config: StreamConfig, merge: MergeOptions, watch: WatchOptions | None
) -> tuple[StreamPlan | None, list[str]]:
    """Check ``config`` and everything it names; return the plan and what is wrong with it.

    Reads headers, probes and data files, loads no model. The plan is None where too little
    of it holds together; problems are one line each.
    """
    check = Checks()
    notes: list[str] = []
    config = check.run(lambda: _with_absolute_base(config)) or config
    retains = config.calibration is not None and config.calibration.task is not None
    method = check.run(lambda: fit_method(config.merge_method, config.parameters, retains))
    base = check.run(lambda: describe(config.base_model))
    dtype = check.run(lambda: config.dtype or _dtype_of(config.base_model, merge))
    if watch is None:
        checkpoints = check.run(
            lambda: find_checkpoints(config.checkpoints, config.base_model, notes.append)
        )
    else:
        checkpoints = None
        check.run(lambda: check_watched(config))
    if method is None or base is None or dtype is None or (watch is None and checkpoints is None):
        return None, check.problems
    described = _describe_all(checkpoints or [], base, config, check)
    for checkpoint in checkpoints or []:
        note = check.run(lambda one=checkpoint: adapter_note(one, config))  # type: ignore[misc]
        notes.extend(note or [])
    steps = len(checkpoints) * config.passes if checkpoints is not None else None
    rates = check.run(lambda: choose_rates(config, method, steps))
    calibration = (
        check.run(lambda: choose_calibration(config, method)) if method.statistics else None
    )
    if config.calibration is not None and not method.statistics:
        notes.append(f"calibration is not used: {method.name} reads no statistics")
    if config.evaluation is None:
        notes.append("no evaluation: the last step becomes the model, however good it is")
    aligns = any(value != 0 for value in leaves(config.parameters.get("alignment", 0)))
    check.run(lambda: check_parameters(config, method, rates))
    check.run(lambda: check_chat_template(config.chat_template))
    check.run(lambda: choose_device(merge.device or "cpu"))
    plan = StreamPlan(
        config=config,
        method=method,
        rates=rates,
        calibration=calibration,
        aligns=aligns and SUBSPACE.name in method.statistics,
        checkpoints=checkpoints,
        fingerprint=_fingerprint(config, merge, base, described, check),
        base=base,
        final_dtype=dtype,
        has_tokenizer=load_own_tokenizer(config.base_model, merge.trust_remote_code) is not None,
        notes=notes,
    )
    return plan, check.problems


def _with_absolute_base(config: StreamConfig) -> StreamConfig:
    return config.model_copy(update={"base_model": absolute_reference(config.base_model)})


def _dtype_of(reference: str, merge: MergeOptions) -> str:
    try:
        found = ModelReference.parse(reference).config(trust_remote_code=merge.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"base_model {reference}: {first_line(error)}") from error
    dtype = str(getattr(found, "dtype", None) or "float32").removeprefix("torch.")
    if dtype not in FINAL_DTYPES:
        raise InputError(f"base_model {reference} is in {dtype}: say dtype: bfloat16 or another")
    return dtype


def _describe_all(
    checkpoints: list[RunCheckpoint], base: Contents, config: StreamConfig, check: Checks
) -> dict[str, str]:
    found: dict[str, str] = {}
    for checkpoint in checkpoints:
        contents = check.run(lambda one=checkpoint: describe(one.reference))  # type: ignore[misc]
        if contents is None:
            continue
        found[checkpoint.name] = contents.fingerprint
        if not config.changes_tokens:
            check.run(lambda one=checkpoint, it=contents: same_shapes(one, it, base))  # type: ignore[misc]
    return found


def _fingerprint(
    config: StreamConfig,
    merge: MergeOptions,
    base: Contents,
    checkpoints: dict[str, str],
    check: Checks,
) -> dict[str, str]:
    found = {
        key: json.dumps(value, sort_keys=True)
        for key, value in config.model_dump(mode="json").items()
        if value is not None
    }
    found["base_model's content"] = base.fingerprint[:16]
    for name, fingerprint in checkpoints.items():
        found[f"content of {name}"] = fingerprint[:16]
    if checkpoints:
        found["checkpoints found"] = ", ".join(checkpoints)
    passes = config.calibration.passes() if config.calibration else []
    names = ("calibration", "calibration.task")
    read = [(name, one.get("dataset")) for name, one in zip(names, passes, strict=False)]
    evaluation = config.evaluation.dataset if config.evaluation else None
    for name, data in (*read, ("evaluation", evaluation)):
        # Of several data sets, each with its weight, only the names are compared.
        file = Path(data).expanduser() if isinstance(data, str) else None
        if file is not None and file.is_file():
            digest = check.run(lambda one=file: hash_file(one))  # type: ignore[misc]
            found[f"content of the {name} data"] = str(digest)[:16]
    for option in _DECISIVE_OPTIONS:
        value = getattr(merge, option)
        if value != MergeOptions.model_fields[option].default:
            found[f"--{option.replace('_', '-')}"] = str(value)
    return found
