"""Everything about a stream that can be known before its first step."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mergekit import merge_methods
from mergekit.common import ModelReference
from mergekit.options import MergeOptions
from pydantic import ValidationError

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.streaming.checkpoints import Checkpoint, find_checkpoints, trained_on
from mergekit_arm.streaming.config import (
    DEFAULT_LEARNING_RATE,
    Calibration,
    StreamConfig,
    absolute_reference,
    plain_path,
)
from mergekit_arm.streaming.contents import Contents, describe
from mergekit_arm.streaming.files import hash_file
from mergekit_arm.streaming.merging import check_document, step_document
from mergekit_arm.streaming.method import StepMethod, fit_method
from mergekit_arm.streaming.models import load_own_tokenizer
from mergekit_arm.streaming.schedule import Rates, check_rates, rate_at
from mergekit_arm.streaming.watch import WatchOptions

T = TypeVar("T")


@dataclass(frozen=True)
class PlannedStep:
    """One step to come."""

    step: int
    passed: int
    checkpoint: Checkpoint
    rate: float | None
    measures: bool
    """Whether the model is calibrated before it."""


@dataclass(frozen=True)
class Plan:
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
    checkpoints: list[Checkpoint] | None
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

    def step(self, number: int, checkpoint: Checkpoint) -> PlannedStep | None:
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
) -> tuple[Plan | None, list[str]]:
    """Check ``config`` and everything it names; return the plan and what is wrong with it.

    Reads headers, probes and data files, loads no model. The plan is None where too little
    of it holds together; problems are one line each.
    """
    check = _Checks()
    notes: list[str] = []
    config = check.run(lambda: _with_absolute_base(config)) or config
    method = check.run(lambda: fit_method(config.merge_method, config.parameters))
    base = check.run(lambda: describe(config.base_model))
    dtype = check.run(lambda: config.dtype or _dtype_of(config.base_model, merge))
    if watch is None:
        checkpoints = check.run(
            lambda: find_checkpoints(config.checkpoints, config.base_model, notes.append)
        )
    else:
        checkpoints = None
        check.run(lambda: _check_watched(config))
    if method is None or base is None or dtype is None or (watch is None and checkpoints is None):
        return None, check.problems
    described = _describe_all(checkpoints or [], base, config, check)
    for checkpoint in checkpoints or []:
        notes.extend(_adapter_note(checkpoint, config))
    steps = len(checkpoints) * config.passes if checkpoints is not None else None
    rates = check.run(lambda: _rates(config, method, steps))
    calibration = check.run(lambda: _calibration(config, method)) if method.statistics else None
    if config.calibration is not None and not method.statistics:
        notes.append(f"calibration is not used: {method.name} reads no statistics")
    if config.evaluation is None:
        notes.append("no evaluation: the last step becomes the model, however good it is")
    aligns = any(value != 0 for value in leaves(config.parameters.get("alignment", 0)))
    check.run(lambda: _check_parameters(config, method, rates))
    plan = Plan(
        config=config,
        method=method,
        rates=rates,
        calibration=calibration,
        aligns=aligns and "subspace" in method.statistics,
        checkpoints=checkpoints,
        fingerprint=_fingerprint(config, merge, base, described, check),
        base=base,
        final_dtype=dtype,
        has_tokenizer=load_own_tokenizer(config.base_model, merge.trust_remote_code) is not None,
        notes=notes,
    )
    return plan, check.problems


def leaves(setting: Any) -> Iterator[Any]:
    """Yield the scalar values of a mergekit parameter setting: gradients, filters, or one value."""
    if isinstance(setting, list):
        for item in setting:
            yield from leaves(item)
    elif isinstance(setting, dict):
        yield from leaves(setting.get("value"))
    else:
        yield setting


class _Checks:
    """Runs checks and collects what they refuse, so that a dry run names everything at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def run(self, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except InputError as error:
            self.problems.append(error.message)
        return None


def _with_absolute_base(config: StreamConfig) -> StreamConfig:
    return config.model_copy(update={"base_model": absolute_reference(config.base_model)})


def _dtype_of(reference: str, merge: MergeOptions) -> str:
    try:
        found = ModelReference.parse(reference).config(trust_remote_code=merge.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"base_model {reference}: {first_line(error)}") from error
    dtype = getattr(found, "dtype", None)
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"


def _check_watched(config: StreamConfig) -> None:
    if isinstance(config.checkpoints, list):
        raise InputError("checkpoints: --watch follows one Trainer output directory, not a list")
    plain_path(config.checkpoints)
    if config.passes > 1:
        raise InputError(
            "passes: --watch goes through the checkpoints once, since the trainer may delete them"
        )


def _rates(config: StreamConfig, method: StepMethod, steps: int | None) -> Rates | None:
    if method.rate_parameter is None:
        if config.learning_rate is not None:
            raise InputError(
                f"learning_rate: {method.name} has none: remove it, or use arm or task_arithmetic"
            )
        if config.evaluation is not None and config.evaluation.backtrack:
            raise InputError(f"evaluation.backtrack: {method.name} has no learning rate to halve")
        return None
    rates = DEFAULT_LEARNING_RATE if config.learning_rate is None else config.learning_rate
    check_rates(rates, steps)
    return rates


def _calibration(config: StreamConfig, method: StepMethod) -> Calibration:
    """Return how the steps measure: subspaces hold the energy that the merge will ask for."""
    calibration = config.calibration or Calibration.model_validate({})
    specs = {spec.name: spec for spec in merge_methods.get(method.name).spec.parameters}
    if "energy" not in specs:
        return calibration
    wanted = leaves(config.parameters.get("energy", specs["energy"].default))
    needed = max(float(one) for one in wanted if isinstance(one, (int, float)))
    measured = calibration.settings["energy"]
    if measured >= needed:
        return calibration
    if "energy" in calibration.document():
        raise InputError(
            f"calibration.energy {measured:g} is less than the merge's energy {needed:g}: "
            "raise it, or lower parameters.energy"
        )
    return calibration.model_copy(update={"settings": {**calibration.settings, "energy": needed}})


def _check_parameters(config: StreamConfig, method: StepMethod, rates: Rates | None) -> None:
    document = step_document(
        config,
        method,
        current=config.base_model,
        checkpoint="checkpoint",
        learning_rate=None if rates is None else rate_at(rates, 0, 1),
        statistics=None,
        checkpoint_statistics=None,
    )
    try:
        check_document(document)
    except (ValidationError, RuntimeError) as error:
        detail = (
            f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
            if isinstance(error, ValidationError)
            else first_line(error)
        )
        raise InputError(f"mergekit does not accept the step's configuration: {detail}") from error
    specs = {spec.name: spec for spec in merge_methods.get(method.name).spec.parameters}
    for key, setting in config.parameters.items():
        for value in leaves(setting):
            try:
                specs[key].validate(value)
            except ValidationError as error:
                raise InputError(
                    f"parameters: {key}: {value!r}: {error.errors()[0]['msg']}"
                ) from error


def _describe_all(
    checkpoints: list[Checkpoint], base: Contents, config: StreamConfig, check: _Checks
) -> dict[str, str]:
    changes_tokens = config.tokenizer is not None or config.tokenizer_source is not None
    found: dict[str, str] = {}
    for checkpoint in checkpoints:
        contents = check.run(lambda one=checkpoint: describe(one.reference))  # type: ignore[misc]
        if contents is None:
            continue
        found[checkpoint.name] = contents.fingerprint
        if not changes_tokens:
            check.run(lambda one=checkpoint, it=contents: _same_shapes(one, it, base))  # type: ignore[misc]
    return found


def _same_shapes(checkpoint: Checkpoint, contents: Contents, base: Contents) -> None:
    common = [name for name in base.shapes if name in contents.shapes]
    if base.shapes and contents.shapes and not common:
        raise InputError(
            f"{checkpoint.name}: no tensor has a name that base_model's have: another architecture"
        )
    for name in common:
        if base.shapes[name] != contents.shapes[name]:
            raise InputError(
                f"{checkpoint.name}: {name} has shape {list(contents.shapes[name])}, base_model's "
                f"has {list(base.shapes[name])}: another model, or added tokens "
                "(then set tokenizer_source: base or union)"
            )


def _adapter_note(checkpoint: Checkpoint, config: StreamConfig) -> list[str]:
    base = trained_on(checkpoint.reference)
    if base is None or absolute_reference(base) == config.base_model:
        return []
    return [f"{checkpoint.name} is an adapter trained on {base}, merged into {config.base_model}"]


def _fingerprint(
    config: StreamConfig,
    merge: MergeOptions,
    base: Contents,
    checkpoints: dict[str, str],
    check: _Checks,
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
    calibration = config.calibration.settings if config.calibration else {}
    evaluation = config.evaluation.dataset if config.evaluation else None
    for name, data in (("calibration", calibration.get("dataset")), ("evaluation", evaluation)):
        file = Path(data).expanduser() if data else None
        if file is not None and file.is_file():
            digest = check.run(lambda one=file: hash_file(one))  # type: ignore[misc]
            found[f"content of the {name} data"] = str(digest)[:16]
    for option in ("random_seed", "lora_merge_dtype"):
        value = getattr(merge, option)
        if value is not None:
            found[f"--{option.replace('_', '-')}"] = str(value)
    return found
