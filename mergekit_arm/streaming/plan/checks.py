"""The single checks that make up a plan; each refuses with one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pydantic import ValidationError

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.merging.documents import accepted
from mergekit_arm.merging.keys import refuse_unread
from mergekit_arm.methods.arm import TASK
from mergekit_arm.methods.parameters import outside
from mergekit_arm.models.contents import ADAPTER_CONFIG, Contents
from mergekit_arm.models.references import absolute_reference, plain_path
from mergekit_arm.streaming.calibration import Calibration
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.plan.document import step_document
from mergekit_arm.streaming.plan.method import StepMethod
from mergekit_arm.streaming.rates import (
    DEFAULT_LEARNING_RATE,
    LineSearch,
    PerRun,
    Rates,
    check_rates,
    rates_at,
)
from mergekit_arm.streaming.training.checkpoints import RunCheckpoint

P = ParamSpec("P")
T = TypeVar("T")


class Checks(list[str]):
    """What the checks that it runs refuse, so that a dry run names everything at once."""

    def run(self, check: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Return what ``check`` returns, None where it refuses."""
        try:
            return check(*args, **kwargs)
        except InputError as error:
            self.append(error.message)
        return None


def leaves(setting: Any) -> Iterator[Any]:
    """Yield the scalar values of a mergekit parameter setting: gradients, filters, or one value."""
    if isinstance(setting, list):
        for item in setting:
            yield from leaves(item)
    elif isinstance(setting, dict):
        yield from leaves(setting.get("value"))
    else:
        yield setting


def check_watched(config: StreamConfig) -> None:
    if isinstance(config.checkpoints, list):
        raise InputError("checkpoints: --watch follows one Trainer output directory, not a list")
    if Path(plain_path(config.checkpoints)).is_file():
        raise InputError(
            f"checkpoints: {config.checkpoints} is a file; --watch follows a Trainer's directory"
        )
    if config.passes > 1:
        raise InputError(
            "passes: --watch goes through the checkpoints once, since the trainer may delete them"
        )


def check_tokenizer(config: StreamConfig) -> None:
    """Refuse a misspelt ``union`` or ``base``, which mergekit would look for on the Hub."""
    nested = (config.tokenizer or {}).get("source")
    for key, source in (("tokenizer_source", config.tokenizer_source), ("tokenizer", nested)):
        known = ("union", "base")
        if isinstance(source, str) and source not in known and not Path(source).exists():
            meant = did_you_mean(source, known)
            if meant:
                raise InputError(f"{key}: no model {source!r} here{meant}")


def choose_rates(config: StreamConfig, method: StepMethod, steps: int | None) -> Rates | None:
    evaluation = config.evaluation
    if method.rate_parameter is None:
        if config.learning_rate is not None:
            raise InputError(
                f"learning_rate: {method.name} has none: remove it, or use arm or task_arithmetic"
            )
        if evaluation is not None and evaluation.backtrack:
            raise InputError(f"evaluation.backtrack: {method.name} has no learning rate to halve")
        return None
    rates = DEFAULT_LEARNING_RATE if config.learning_rate is None else config.learning_rate
    if isinstance(rates, LineSearch):
        if evaluation is None:
            raise InputError("learning_rate: a search needs an evaluation to choose by")
        if evaluation.backtrack:
            raise InputError(
                "evaluation.backtrack: a search tries rates already, and 0 among them; remove it"
            )
    check_rates(rates, steps)
    return rates


def choose_calibration(config: StreamConfig, method: StepMethod) -> Calibration:
    """Return how the steps measure: where it is not said, subspaces hold what the merge will read.

    With ``arm``'s default energy that is one direction an input, and a tenth of the disk that
    ``calibrate``'s own default takes, which has to serve every method.
    """
    calibration = config.calibration or Calibration.model_validate({})
    of_task = config.parameters.get(TASK) is not None
    if of_task and calibration.task is None and calibration.refresh != "once":
        raise InputError(
            f"calibration.refresh: later models are measured on the task's text too, and "
            f"{TASK} is of the base alone: name both texts, calibration.general and "
            "calibration.task"
        )
    if "energy" not in method.specs or calibration.task is not None or of_task:
        return calibration  # what is retained is read whole
    wanted = energy_read(config, method)
    if "energy" not in calibration.written:
        # Weights that no filter of the merge names read the method's default.
        settings = {
            **calibration.settings,
            "energy": max(wanted, float(method.specs["energy"].default)),
        }
        return calibration.model_copy(update={"settings": settings})
    measured = calibration.settings["energy"]
    if measured < wanted:
        raise InputError(
            f"calibration.energy {measured:g} is less than the merge's energy {wanted:g}: "
            "raise it, or lower parameters.energy"
        )
    return calibration


def energy_read(config: StreamConfig, method: StepMethod) -> float:
    """Return the largest energy that a merge with ``method`` reads of a subspace.

    What is written and is no energy is left out: ``check_parameters`` refuses it.
    """
    spec, found = method.specs["energy"], []
    for value in leaves(config.parameters.get("energy", spec.default)):
        with suppress(InputError):
            found.append(float(spec.validate(value)))
    return max(found, default=float(spec.default))


def check_parameters(config: StreamConfig, method: StepMethod, rates: Rates | None) -> None:
    """Let mergekit parse a step, and refuse keys that it would ignore and values that it would."""
    first = None
    if rates is not None:
        many = len(rates.runs) if isinstance(rates, PerRun) else 1
        first = rates.search[:1] if isinstance(rates, LineSearch) else rates_at(rates, 0, 1, many)
    document = step_document(
        config, method, current=config.base_model, checkpoints=["checkpoint"], rates=first
    )
    accepted(document)
    refuse_unread(document)
    for key, setting in config.parameters.items():
        values = list(leaves(setting))
        if not values:
            raise InputError(
                f"parameters: {key}: an empty list says nothing: write a value, or remove it"
            )
        for value in values:
            try:
                problem = outside(method.specs[key], method.specs[key].validate(value))
            except ValidationError as error:
                problem = f"{value!r}: {error.errors()[0]['msg']}"
            if problem:
                raise InputError(f"parameters: {key}: {problem}")


def adapter_notes(checkpoint: RunCheckpoint, config: StreamConfig) -> list[str]:
    """Say of a local adapter whether its own configuration names another base."""
    _, plus, adapter = checkpoint.reference.partition("+")
    file = Path(adapter) / ADAPTER_CONFIG
    if not plus or not file.is_file():
        return []
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base or absolute_reference(str(base)) == config.base_model:
        return []
    return [f"{checkpoint.name} is an adapter trained on {base}, merged into {config.base_model}"]


def same_shapes(checkpoint: RunCheckpoint, contents: Contents, base: Contents) -> None:
    """Refuse a checkpoint whose tensors have other shapes than the base's.

    Raises:
        InputError: naming the tensor.
    """
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
