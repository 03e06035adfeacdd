"""Everything about a stream that can be known before its first step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from glob import glob
from hashlib import sha256
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_arm.data.settings import parse_share
from mergekit_arm.errors import InputError, first_line
from mergekit_arm.files import sampled_hash
from mergekit_arm.merging.documents import FINAL_DTYPES, check_chat_template
from mergekit_arm.merging.options import decisive_options
from mergekit_arm.methods.arm import TASK
from mergekit_arm.methods.base import STATS
from mergekit_arm.models.contents import Contents, describe, shortened
from mergekit_arm.models.loading import choose_device
from mergekit_arm.models.references import absolute_reference
from mergekit_arm.models.tokenizer import load_own_tokenizer
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.statistics.read import open_statistics
from mergekit_arm.streaming.calibration import Calibration
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.plan.checks import (
    Checks,
    adapter_notes,
    check_parameters,
    check_tokenizer,
    check_watched,
    choose_calibration,
    choose_rates,
    leaves,
    same_shapes,
)
from mergekit_arm.streaming.plan.document import TOKENS
from mergekit_arm.streaming.plan.method import StepMethod, fit_method
from mergekit_arm.streaming.plan.prefix import check_prefix
from mergekit_arm.streaming.rates import LineSearch, Rate, Rates, entries, rates_at
from mergekit_arm.streaming.state import State
from mergekit_arm.streaming.training.checkpoints import Group, list_checkpoints


@dataclass(frozen=True)
class PlannedStep:
    """One step to come."""

    step: int
    position: int
    """Which of the checkpoints, from 0, those counted that were skipped."""
    passed: int
    checkpoints: Group
    rates: list[Rate] | None
    """Of each checkpoint; None where the method has none, or where they are searched for."""
    search: list[float]
    """The rates of which the step takes the best."""
    measures: bool
    """Whether the model is calibrated before it."""

    @property
    def name(self) -> str:
        """The checkpoints' names."""
        return " + ".join(one.name for one in self.checkpoints)

    @property
    def planned(self) -> Any:
        """What the configuration says of its learning rate, as the state stores it."""
        return {"search": self.search} if self.search else one_or_all(self.rates)


def one_or_all(rates: list[Rate] | None) -> Any:
    """Return the one rate of a list, the list where it has several."""
    return rates[0] if rates is not None and len(rates) == 1 else rates


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
    published: dict[str, str]
    """Statistics of the base that the user has already, by parameter."""
    aligns: bool
    """Whether the checkpoints are measured as well."""
    checkpoints: list[Group] | None
    """What is merged in one pass; None under ``--watch``: they are not known yet."""
    fingerprint: dict[str, str]
    base: Contents
    final_dtype: str
    has_tokenizer: bool
    """Whether the base comes with one, for the steps to hand on."""
    notes: list[str] = field(default_factory=list)

    @property
    def length(self) -> int | None:
        """The number of checkpoints to be merged, None where it is not known."""
        if self.checkpoints is None:
            return entries(self.rates)
        return len(self.checkpoints) * self.config.passes

    def planned(self, step: int, position: int, checkpoints: Group) -> PlannedStep:
        """Return step ``step`` (from 1), which merges ``checkpoints`` at their ``position``."""
        search = self.rates.search if isinstance(self.rates, LineSearch) else []
        rates = None
        if self.rates is not None and not search:
            rates = rates_at(self.rates, position, self.length, len(checkpoints))
        measures = self.calibration is not None and self.calibration.due(step)
        return PlannedStep(
            step,
            position,
            1 + position // len(self.checkpoints) if self.checkpoints else 1,
            checkpoints,
            rates,
            search,
            measures and not (step == 1 and self._published_all),
        )

    @property
    def retains(self) -> bool:
        """Whether steps read the task's text beside general text."""
        return TASK in self.published or bool(self.calibration and self.calibration.task)

    @property
    def _published_all(self) -> bool:
        """Whether nothing of the base is to be measured."""
        passes = self.calibration.passes() if self.calibration else []
        return all(key in self.published for key in (STATS, TASK)[: len(passes)])

    def steps(self, state: State | None = None) -> list[PlannedStep]:
        """Return the steps that ``state`` does not hold yet, by default all."""
        groups = (self.checkpoints or []) * self.config.passes
        skipped, done = (len(state.skipped), state.position) if state else (0, 0)
        return [
            self.planned(position + 1 - skipped, position, groups[position])
            for position in range(done, len(groups))
        ]


def make_plan(
    config: StreamConfig,
    merge: MergeOptions,
    *,
    watched: bool = False,
    state: State | None = None,
) -> tuple[StreamPlan | None, list[str]]:
    """Check ``config`` and everything it names; return the plan and what is wrong with it.

    Reads headers and a few bytes of models and data, loads no model. Of a stream that has begun,
    ``state``, it checks that what is merged is the beginning of what is to be. The plan is None
    where too little of it holds together.
    """
    check = Checks()
    notes: list[str] = []
    absolute = check.run(absolute_reference, config.base_model) or config.base_model
    config = config.model_copy(update={"base_model": absolute})
    retains = TASK in config.parameters or bool(config.calibration and config.calibration.task)
    together = config.checkpoints if isinstance(config.checkpoints, list) else []
    most = max((len(one) for one in together if isinstance(one, list)), default=1)
    method = check.run(fit_method, config.merge_method, config.parameters, retains, most)
    base = check.run(describe, config.base_model)
    dtype = check.run(_final_dtype, config, merge)
    checkpoints = None
    if watched:
        check.run(check_watched, config)
    else:
        checkpoints = check.run(list_checkpoints, config, state, notes.append)
    if method is None or base is None or dtype is None or (not watched and checkpoints is None):
        return None, check
    begun = len(state.handled) if state else 0
    for one in (one for group in (checkpoints or [])[begun:] for one in group):
        contents = check.run(describe, one.reference)
        if contents is None and begun:
            notes.append(f"{one.name} will be skipped: {check.pop()}")
        elif contents is not None and not config.changes_tokens:
            check.run(same_shapes, one, contents, base)
        notes += check.run(adapter_notes, one, config) or []
    steps = len(checkpoints) * config.passes if checkpoints is not None else None
    rates = check.run(choose_rates, config, method, steps)
    calibration, published = None, dict[str, str]()
    if method.statistics:
        calibration = check.run(choose_calibration, config, method)
        given = {key: config.parameters.get(key) for key in (STATS, TASK)}
        published = {key: value for key, value in given.items() if value is not None}
    elif config.calibration is not None:
        notes.append(f"calibration is not used: {method.name} reads no statistics")
    if config.evaluation is None:
        notes.append("no evaluation: the last step becomes the model, however good it is")
    aligns = any(value != 0 for value in leaves(config.parameters.get("alignment", 0)))
    check.run(check_tokenizer, config)
    check.run(check_parameters, config, method, rates)
    check.run(check_chat_template, config.chat_template)
    check.run(choose_device, merge.device or "cpu")
    plan = StreamPlan(
        config=config,
        method=method,
        rates=rates,
        calibration=calibration,
        published=published,
        aligns=aligns and SUBSPACE.name in method.statistics,
        checkpoints=checkpoints,
        fingerprint={
            **(check.run(_fingerprint, config, calibration, merge, base) or {}),
            **_contents_of_statistics(published),
        },
        base=base,
        final_dtype=dtype,
        has_tokenizer=load_own_tokenizer(config.base_model, merge.trust_remote_code) is not None,
        notes=notes,
    )
    if state is not None and not check:
        check.run(check_prefix, plan, state)
    return plan, check


def _final_dtype(config: StreamConfig, merge: MergeOptions) -> str:
    if config.dtype is not None:
        return config.dtype
    base = config.base_model
    try:
        found = ModelReference.parse(base).config(trust_remote_code=merge.trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"base_model {base}: {first_line(error)}") from error
    dtype = str(getattr(found, "dtype", None) or "float32").removeprefix("torch.")
    if dtype not in FINAL_DTYPES:
        raise InputError(f"base_model {base} is in {dtype}: say dtype: bfloat16 or another")
    return dtype


def _fingerprint(
    config: StreamConfig, calibration: Calibration | None, merge: MergeOptions, base: Contents
) -> dict[str, str]:
    """Return what a step depends on beside the checkpoints and their rates, which it records."""
    found = {"merge_method": config.merge_method}
    found["base_model's content"] = shortened(base.fingerprint)
    if isinstance(config.checkpoints, str):
        found["checkpoints"] = absolute_reference(config.checkpoints)
    for key in ("parameters", *TOKENS):
        value = getattr(config, key)
        if value:
            found[key] = json.dumps(value, sort_keys=True)
    if calibration is not None:
        found["calibration"] = json.dumps(calibration.chosen(), sort_keys=True)
        found["calibration.refresh"] = str(calibration.refresh)
        texts = zip(("calibration", "calibration.task"), calibration.passes(), strict=False)
        found |= contents_of({name: one.get("dataset") for name, one in texts})
    return found | decisive_options(merge)


def contents_of(datasets: Mapping[str, str | tuple[str, ...] | None]) -> dict[str, str]:
    """Return what recognises data files here; of data elsewhere only the names are compared."""
    found = {}
    for name, given in datasets.items():
        texts = (given,) if isinstance(given, str) else given or ()
        hashes = [one for text in texts for one in _hashes(parse_share(text).name)]
        if hashes:
            whole = hashes[0] if len(hashes) == 1 else sha256(" ".join(hashes).encode()).hexdigest()
            found[f"content of the {name} data"] = whole[:16]
    return found


def _hashes(name: str) -> list[str]:
    """Return a hash of each file that a data set's name means here, by their order."""
    path = Path(name).expanduser()
    if path.is_dir():
        return [sampled_hash(one) for one in sorted(path.rglob("*")) if one.is_file()]
    if path.is_file():
        return [sampled_hash(path)]
    return [sampled_hash(Path(one)) for one in sorted(glob(str(path))) if Path(one).is_file()]


def _contents_of_statistics(published: Mapping[str, str]) -> dict[str, str]:
    """Return what recognises published statistics."""
    found = {}
    for key, reference in published.items():
        with suppress(InputError):  # ``check_parameters`` refuses them
            digest = open_statistics(reference).metadata.digest
            found[f"content of parameters.{key}"] = (digest or "")[:16]
    return found
