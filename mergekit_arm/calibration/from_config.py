"""What ``mergekit-arm calibrate --config`` measures: the statistics that a merge will read.

A merge configuration, or a search of one, names models, and statistics directories for them. Its
section ``calibration``, which mergekit passes over, says on what text each is measured::

    calibration:
      default: {samples: 128}
      ./specialist-a-stats: {dataset: ./a.jsonl}

``default`` holds for all directories, the others' keys are the directories. Everything is checked
before anything is measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from pydantic import ValidationError

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.reading import check_calibration
from mergekit_arm.calibration.settings import NOT_IN_FILES, checked_settings
from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.files import is_path
from mergekit_arm.models.tensors import CheckpointTensors
from mergekit_arm.sections import read_mapping
from mergekit_arm.statistics.read import open_statistics
from mergekit_arm.statistics.write import check_destination

SECTION = "calibration"
DEFAULT = "default"
_STATS = ("activation_stats", "task_stats")
"""Parameters whose values are statistics; under the top level, both are of the base model."""


@dataclass(frozen=True)
class _Wanted:
    """A statistics directory that the merge reads."""

    directory: str
    """As it is written."""
    model: str
    general: bool
    """Of the base, on general text: for this alone there is a data set by default."""


def plan_calibrations(
    path: str | Path,
    given: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[CalibrationOptions]:
    """Return what is to be measured for the merge configuration at ``path``, all of it checked.

    A directory that exists is left as it is (unless ``force`` is given), and is checked to be of
    the model it is named for, as is what lies on the Hub. ``say`` is told what becomes of each.

    Args:
        path: a mergekit configuration, its paths relative to the working directory.
        given: fields of ``CalibrationOptions`` that hold wherever the file says nothing else.
        say: receives one line for each directory.

    Raises:
        InputError: the first thing that is wrong; nothing has been measured then.
    """
    given, say = given or {}, say or (lambda note: None)
    document = read_mapping(Path(path))
    wanted = _wanted(path, document)
    section = _section(path, document, wanted)
    flags = {name: value for name, value in given.items() if name not in NOT_IN_FILES}
    default = {**section.pop(DEFAULT, {}), **flags}
    planned = []
    for key, one in wanted.items():
        directory = one.directory
        if not given.get("force") and (os.path.isdir(directory) or not _is_here(directory)):
            _check_left(directory, one.model, say)
            continue
        options = _options(path, one, {**default, **section.get(key, {})}, given)
        try:
            check_destination(Path(options.out), options.force)
            check_calibration(options)
        except InputError as error:
            raise InputError(f"{directory}: {error.message}") from error
        data = options.dataset if isinstance(options.dataset, str) else ", ".join(options.dataset)
        say(f"{directory}: to be measured on {one.model} with {data}")
        planned.append(options)
    return planned


def _settled(node: Any) -> Any:
    """Return a configuration with the unknowns of a search at the first of their values."""
    if isinstance(node, Mapping):
        tried = node.get("tune")
        if isinstance(tried, list) and tried:
            return tried[0]
        return {key: _settled(value) for key, value in node.items()}
    return [_settled(value) for value in node] if isinstance(node, list) else node


def _wanted(path: str | Path, document: Mapping[str, Any]) -> dict[str, _Wanted]:
    """Return the directories that the merge reads by their places, and the model of each."""
    try:
        config = MergeConfiguration.model_validate(_settled(document))
    except (ValidationError, RuntimeError) as error:
        raise InputError(
            f"{path}: mergekit does not accept it: {' '.join(str(error).split())[:200]}"
        ) from error
    found: dict[str, _Wanted] = {}
    for model, parameters, is_base in _parameters(config):
        for name in _STATS:
            for directory in _words((parameters or {}).get(name)):
                if model is None:
                    raise InputError(f"{path}: {name} {directory}: there is no base_model")
                one = _Wanted(directory, str(model), is_base and name == _STATS[0])
                other = found.setdefault(_place(directory), one)
                if other.model != one.model:
                    raise InputError(
                        f"{path}: {directory} is named for {other.model} and for {one.model}: "
                        "each model has its own statistics"
                    )
    if not found:
        raise InputError(f"{path}: no {' or '.join(_STATS)} in it, so that nothing is to measure")
    return found


def _parameters(
    config: MergeConfiguration,
) -> Iterator[tuple[ModelReference | None, Mapping[str, Any] | None, bool]]:
    """Yield every place where statistics are named: the model they are of, and the parameters."""
    yield config.base_model, config.parameters, True
    parts = [config, *(config.modules or {}).values()]
    for part in parts:
        if part is not config:
            yield config.base_model, part.parameters, True
        for model in part.models or []:
            yield model.model, model.parameters, model.model == config.base_model
        for output in part.slices or []:
            base = output.base_model or config.base_model
            yield base, output.parameters, True
            for source in output.sources:
                yield source.model, source.parameters, source.model == base


def _words(setting: Any) -> Iterator[str]:
    """Yield the values of a setting: one, a gradient's, or those of filters."""
    if isinstance(setting, list):
        for one in setting:
            yield from _words(one)
    elif isinstance(setting, str):
        yield setting
    elif setting is not None:
        yield from _words(getattr(setting, "value", None))


def _place(directory: str) -> str:
    """Return what is the same however a directory is written."""
    return os.path.abspath(directory) if _is_here(directory) else directory


def _is_here(directory: str) -> bool:
    """Say whether a name is a directory's, there or not, and not one on the Hub."""
    return os.path.isdir(directory) or is_path(directory) or directory.count("/") != 1


def _section(
    path: str | Path, document: Mapping[str, Any], wanted: Mapping[str, _Wanted]
) -> dict[str, dict[str, Any]]:
    section = document.get(SECTION) or {}
    where = f"{path}: {SECTION}"
    if not isinstance(section, dict) or not all(isinstance(one, dict) for one in section.values()):
        raise InputError(
            f"{where} must hold mappings such as {{./a-stats: {{dataset: ./a.jsonl}}}}"
        )
    found = {}
    for key, settings in section.items():
        places = (key, os.path.abspath(str(key)))  # a/b may be on the Hub, or here
        name = next((one for one in places if one in {DEFAULT, *wanted}), None)
        if name is None:
            known = [one.directory for one in wanted.values()]
            raise InputError(
                f"{where}: {key} is no statistics directory of this merge"
                f"{did_you_mean(str(key), [DEFAULT, *known])}; there are: {', '.join(known)}"
            )
        _checked(path, str(key), settings)  # also of what is there already, and is not measured
        found[name] = settings
    return found


def _checked(path: str | Path, key: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one directory, or of all by default, as a calibration's options.

    Raises:
        InputError: a key that does not exist, or a value of a wrong type.
    """
    try:
        return checked_settings(settings)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {SECTION}: {key}: {place}: {first['msg']}") from error
    except ValueError as error:
        raise InputError(f"{path}: {SECTION}: {key}: {error}") from error


def _options(
    path: str | Path,
    wanted: _Wanted,
    settings: Mapping[str, Any],
    given: Mapping[str, Any],
) -> CalibrationOptions:
    directory = wanted.directory
    if "dataset" not in settings and not wanted.general:
        raise InputError(
            f"{path}: no dataset for {directory}: add {SECTION}: {{{directory}: {{dataset: …}}}}, "
            f"the text that {wanted.model} is to be measured on"
        )
    decided = {name: given[name] for name in NOT_IN_FILES if name in given}
    checked = _checked(path, directory, settings)
    return CalibrationOptions(model=wanted.model, out=directory, **{**checked, **decided})


def _check_left(directory: str, model: str, say: Callable[[str], None]) -> None:
    """Check that statistics that exist are ``model``'s, as far as its files tell."""
    statistics = open_statistics(directory)
    parsed = ModelReference.parse(model)
    note = ""
    if parsed.lora is None and os.path.isdir(parsed.model.path):
        checkpoint = CheckpointTensors(Path(parsed.model.path))
        for name in checkpoint.names:
            tensor = checkpoint.get(name)
            if tensor.is_floating_point() and tensor.numel():
                statistics.matcher.find(name, tensor)
    elif str(ModelReference.parse(statistics.metadata.model.reference)) != str(parsed):
        note = f" (measured on {statistics.metadata.model.reference}; the merge compares values)"
    say(f"{directory}: there already, of {model}{note}")
