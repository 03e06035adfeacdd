"""Everything that can be wrong with a merge configuration, in the order of what depends on what."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethod
from mergekit.options import MergeOptions
from pydantic import ValidationError

from mergekit_arm.calibration.from_config import SECTION
from mergekit_arm.calibration.settings import checked_settings
from mergekit_arm.checking.filters import check_read
from mergekit_arm.checking.findings import Findings
from mergekit_arm.checking.keys import check_keys, parse
from mergekit_arm.checking.models import Model, loaders, place_of, read_models
from mergekit_arm.checking.parameters import check_parameters
from mergekit_arm.checking.planning import plan
from mergekit_arm.checking.room import check_room, estimate
from mergekit_arm.checking.tensors import TensorCheck
from mergekit_arm.checking.vocabulary import builds_tokenizer, check_vocabulary
from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.merging.room import Room
from mergekit_arm.methods import find_method


def check_merge(
    findings: Findings, options: MergeOptions, out: Path | None, made: frozenset[str]
) -> Room | None:
    """Check the merge configuration of ``findings``.

    Args:
        findings: of a document that holds a mapping; receives what is found.
        options: those of mergekit's options that decide what it accepts.
        out: where the merged model is to lie; None: room for it is not looked at.
        made: names of models that other documents of the file make (``mergekit-multi``); such a
            model is not there yet, and a merge of it is looked at as far as its text goes.

    Returns:
        What the merge takes; None where it cannot be planned, or room is not looked at.
    """
    document = findings.document
    check_keys(document.value, findings)
    config = parse(document, findings)
    method = _method(document.value, findings)
    _check_calibration(findings)
    if config is None:
        return None
    if method is not None:
        check_parameters(config, method.spec, findings)
    _check_dtypes(config, findings)
    _check_slices(config, findings)
    references = config.referenced_models()
    waiting = [one for one in references if one.model.path in made]
    for one in waiting:
        findings.note(place_of(document, one), "is made by another document of this file, and "
                      "the rest of this one is checked once it is there")  # fmt: skip
    models = read_models(
        [one for one in references if one not in waiting],
        findings,
        trust_remote_code=options.trust_remote_code,
        lora_cache=options.lora_merge_cache,
    )
    if method is None or len(models) < len(references):
        return None
    with loaders(models):
        return _check_planned(config, method, models, findings, options, out)


def _check_planned(
    config: MergeConfiguration,
    method: MergeMethod,
    models: Mapping[ModelReference, Model],
    findings: Findings,
    options: MergeOptions,
    out: Path | None,
) -> Room | None:
    planned = plan(config, options, findings)
    if planned is None:
        return None
    for name in (
        (planned.architecture.modules.keys() - config.modules.keys()) if (config.modules) else ()
    ):
        findings.error(("modules",), f"has no {name}, so that the merged model lacks its weights")
    check_read(config, method.spec, planned.tensors, findings)
    tensors = TensorCheck(config, models, realigned=builds_tokenizer(config))
    for one in planned.tensors:
        tensors.check(one)
    tensors.found.report(findings)
    check_vocabulary(
        config, models, planned.tensors, findings, trust_remote_code=options.trust_remote_code
    )
    if findings.errors or out is None:
        return None
    room = estimate(config, models, planned.tensors, out, options)
    check_room(room, out, findings)
    return room


def _method(value: Mapping[str, object], findings: Findings) -> MergeMethod | None:
    name = value.get("merge_method")
    if not isinstance(name, str):
        return None  # mergekit's own refusal says so
    try:
        return find_method(name)
    except InputError as error:
        findings.error(("merge_method",), error.message.removeprefix("merge_method: "))
    return None


def _check_calibration(findings: Findings) -> None:
    """Check the section that ``calibrate --config`` reads."""
    section = findings.document.value.get(SECTION)
    if section is None:
        return
    if not isinstance(section, dict):
        findings.error((SECTION,), "must hold mappings such as {./a-stats: {dataset: ./a.jsonl}}")
        return
    for key, settings in section.items():
        try:
            if not isinstance(settings, dict):
                raise ValueError("must be a mapping such as {dataset: ./a.jsonl}")
            checked_settings(settings)
        except ValidationError as error:
            first = error.errors()[0]
            findings.error((SECTION, key, *first["loc"]), first["msg"])
        except (ValueError, InputError) as error:
            findings.error((SECTION, key), getattr(error, "message", None) or str(error))


def _check_dtypes(config: MergeConfiguration, findings: Findings) -> None:
    known = ("bfloat16", "float16", "float32", "float64")
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        if not name:
            continue
        try:
            fits = getattr(dtype_from_name(name), "is_floating_point", False)
        except RuntimeError:
            fits = False
        if not fits:
            findings.error(
                (key,), f"{name!r} is none of {', '.join(known)}{did_you_mean(name, known)}"
            )


def _check_slices(config: MergeConfiguration, findings: Findings) -> None:
    parts = [((), config)] + [
        (("modules", name), module) for name, module in (config.modules or {}).items()
    ]
    for place, part in parts:
        for number, output in enumerate(part.slices or []):
            if not output.sources:
                findings.error((*place, "slices", number, "sources"), "is empty: name a model")
            for index, source in enumerate(output.sources):
                first, last = source.layer_range
                if not 0 <= first < last:
                    findings.error(
                        (*place, "slices", number, "sources", index, "layer_range"),
                        f"[{first}, {last}] is no range of layers: the first counts from 0, and "
                        "the last is left out",
                    )
            if output.residual_weight is not None:
                findings.error(
                    (*place, "slices", number, "residual_weight"),
                    "mergekit reads this key and does nothing with it: remove it",
                )
