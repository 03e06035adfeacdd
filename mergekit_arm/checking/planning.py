"""mergekit's own plan of a merge, written down tensor by tensor.

mergekit validates parameters, inputs and, through our methods, statistics while it plans. Its
planner stops at the first thing that is wrong; the one here collects, and keeps what settings each
tensor's parameters were looked up in.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.common import ModelReference
from mergekit.config import ConfigReader, MergeConfiguration
from mergekit.merge import _model_out_config
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_arm.checking.document import Place
from mergekit_arm.checking.findings import Findings, Repeated, blamed
from mergekit_arm.errors import InputError, first_line


@dataclass(frozen=True)
class Planned:
    """One output tensor, and the settings that its parameters are looked up in."""

    weight: WeightInfo
    inputs: Mapping[ModelReference, WeightInfo]
    shared: Sequence[Place]
    """Places of ``parameters``, the first one first."""
    own: Mapping[ModelReference, Sequence[Place]]
    task: ExecuteMergeMethodTask | None
    """None where mergekit refuses it, or leaves it out."""


@dataclass
class Plan:
    """What mergekit would do."""

    architecture: Any
    """mergekit's ``ModelArchitecture``."""
    config: Any
    """Of the merged model."""
    tensors: list[Planned] = field(default_factory=list)


def plan(config: MergeConfiguration, options: MergeOptions, findings: Findings) -> Plan | None:
    """Let mergekit plan ``config``; what it refuses becomes findings. None where it cannot begin.

    ``LoaderCache`` must hold every model's loader (``models.loaders``).
    """
    planner = None
    with quiet():
        try:
            architecture = get_architecture_info(config, options)
            out = _model_out_config(config, architecture, options.trust_remote_code)
            copied = config.model_copy(deep=True)  # mergekit rewrites what it plans
            planner = _Planner(copied, architecture, options, out)
            planner.places = _Places(config)
            planner.plan_to_disk("")
        except InputError as error:
            findings.error(blamed(findings.document, error.message), error.message)
        except KeyError as error:
            known = list(architecture.modules)
            findings.error(
                ("modules", error.args[0]), f"the model has no such module: {', '.join(known)}"
            )
        except Exception as error:  # whatever mergekit lets through
            message = first_line(error)
            findings.error(blamed(findings.document, message), message)
    if planner is None:
        return None
    planner.refused.report(findings)
    return Plan(architecture, out, planner.planned)


class _Places:
    """Where the slices and models of mergekit's own rewriting stand in the document."""

    def __init__(self, config: MergeConfiguration) -> None:
        self._config = config

    def shared(self, module: str, number: int) -> list[Place]:
        """Return where a shared parameter is looked up, of output slice ``number``."""
        config = self._config
        found: list[Place] = []
        if config.modules:
            if config.modules[module].slices:
                found.append(("modules", module, "slices", number, "parameters"))
            found.append(("modules", module, "parameters"))
        elif config.slices:
            found.append(("slices", number, "parameters"))
        return [*found, ("parameters",)]

    def own(self, module: str, number: int, index: int) -> Place:
        """Return the place of one input's own parameters."""
        config = self._config
        start: Place = ("modules", module) if config.modules else ()
        part = config.modules[module] if config.modules else config
        if part.models:
            return (*start, "models", index, "parameters")
        return (*start, "slices", number, "sources", index, "parameters")


class _Planner(MergePlanner):  # type: ignore[misc]  # mergekit is untyped
    """mergekit's planner, which goes on after an error and keeps what it has planned."""

    places: _Places

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.planned: list[Planned] = []
        self.refused = Repeated()

    def plan_tensor(
        self,
        weight: WeightInfo,
        weights_in: list[WeightInfo],
        models: list[ModelReference],
        cfg_reader: ConfigReader,
    ) -> None:
        """Plan one tensor."""
        count = len(self._tensors)
        task = None
        try:
            super().plan_tensor(weight, weights_in, models, cfg_reader)
        except (ValueError, RuntimeError, TypeError, KeyError, click.ClickException) as error:
            message = getattr(error, "message", None) or _of_pydantic(error)
            self.refused.add(message, {weight.name, *(one.name for one in weights_in)})
        else:
            if len(self._tensors) == count:
                return  # an optional tensor that no model has
            task = self._tensors[-1][1]
        module, number = self._part(cfg_reader)
        shared = self.places.shared(module, number)
        sources = list(cfg_reader.slice_out.sources)
        own = {
            model: [
                *(
                    self.places.own(module, number, index)
                    for index, source in enumerate(sources)
                    if source.model == model
                ),
                *shared,
            ]
            for model in models
        }
        inputs = dict(zip(models, weights_in, strict=False))
        self.planned.append(Planned(weight, inputs, shared, own, task))

    def _part(self, reader: ConfigReader) -> tuple[str, int]:
        for name, module in self.config.modules.items():
            for number, output in enumerate(module.slices):
                if output is reader.slice_out:
                    return name, number
        raise AssertionError("a slice that is in no module")


def _of_pydantic(error: Exception) -> str:
    errors = getattr(error, "errors", None)
    if errors is None:
        return first_line(error)
    return str(errors()[0]["msg"]).removeprefix("Value error, ")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what mergekit logs while it plans to itself: findings say it."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
