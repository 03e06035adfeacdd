"""What a search may try, by method: parameters that mergekit knows, within their own bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit.architecture import get_architecture_info
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import ParameterSpec
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from pydantic import ValidationError

from mergekit_arm.errors import InputError, did_you_mean, first_line
from mergekit_arm.merging.documents import accepted
from mergekit_arm.methods import find_method
from mergekit_arm.methods.parameters import Interval, range_of
from mergekit_arm.tuning.space import METHOD, Dimension, Domain, Space, Value, parameter_names

Point = tuple[str, dict[str, Value]]
"""A method, and the value of each of its unknowns."""


def specs_of(method: str) -> dict[str, ParameterSpec]:
    """Return what a method declares, by parameter.

    Raises:
        InputError: there is no such method.
    """
    return {spec.name: spec for spec in find_method(method).spec.parameters}


def domains(space: Space) -> dict[str, dict[str, Domain]]:
    """Return for every method the unknowns that it has, each checked against its parameters.

    Raises:
        InputError: an unknown method or parameter, or a range outside a parameter's own bounds.
    """
    specs = {method: specs_of(method) for method in space.methods}
    for where, name in parameter_names(space.document):
        if not any(name in one for one in specs.values()):
            every = {known: None for one in specs.values() for known in one}
            methods = " or ".join(space.methods)
            raise InputError(f"{where}: {methods} has no {name!r}{did_you_mean(name, every)}")
    return {
        method: {
            dimension.name: _checked(dimension, method, known)
            for dimension in space.dimensions
            if dimension.parameters & known.keys()
        }
        for method, known in specs.items()
    }


def document_of(space: Space, point: Point) -> dict[str, Any]:
    """Return the configuration of one point."""
    method, values = point
    filled: dict[str, Any] = space.fill(method, values, frozenset(specs_of(method)))
    return filled


def default_points(space: Space, found: Mapping[str, Mapping[str, Domain]]) -> list[Point]:
    """Return for every method the point that its parameters' defaults make.

    Where there is no default, or the space leaves it out, it is the space's middle.
    """
    points = []
    for method, unknowns in found.items():
        specs = specs_of(method)
        names = {one.name: one.parameters for one in space.dimensions}
        values: dict[str, Value] = {}
        for name, domain in unknowns.items():
            given = [specs[p].default for p in sorted(names[name]) if p in specs]
            defaults = [_plain(one) for one in given if one in domain]
            values[name] = defaults[0] if defaults else domain.middle()
        points.append((method, values))
    return points


def _plain(value: Any) -> Value:
    found: Value = float(value) if isinstance(value, float) else value
    return found


def baseline_document(
    document: Mapping[str, Any], weights: Sequence[float]
) -> dict[str, Any] | None:
    """Return task arithmetic of the same models at one weight that is to be found.

    None where the configuration has no base, or merges slices or modules.
    """
    if "base_model" not in document or "models" not in document:
        return None
    others = [{"model": one["model"]} for one in document["models"]]
    others = [one for one in others if one["model"] != document["base_model"]]
    if not others:
        return None
    kept = ("base_model", "dtype", "out_dtype", "tokenizer", "tokenizer_source", "chat_template")
    return {
        METHOD: "task_arithmetic",
        **{key: document[key] for key in kept if key in document},
        "models": others,
        "parameters": {"weight": {"tune": list(weights), "choice": True, "name": "weight"}},
    }


def check_weights(space: Space, found: Mapping[str, Mapping[str, Domain]]) -> None:
    """Refuse a search for a weight that every method divides by itself.

    TIES, DELLA and others divide weights by their sum: one for all models then changes nothing.

    Raises:
        InputError: naming the unknown, and what to write.
    """
    for dimension in space.dimensions:
        if dimension.parameters != {"weight"}:
            continue
        methods = [method for method, unknowns in found.items() if dimension.name in unknowns]
        if methods and all(_divided(space, method, found[method], dimension) for method in methods):
            raise InputError(
                f"{dimension.name}: {methods[0]} divides weights by their sum, so that this one "
                "changes nothing: write normalize: false under parameters, or give each model a "
                "weight of its own"
            )


def _divided(
    space: Space, method: str, unknowns: Mapping[str, Domain], dimension: Dimension
) -> bool:
    values = {name: domain.middle() for name, domain in unknowns.items()}
    shares = {
        _shares(document_of(space, (method, {**values, dimension.name: end})), method)
        for end in dimension.domain.ends()
    }
    return None not in shares and len(shares) == 1


def _shares(document: Mapping[str, Any], method: str) -> tuple[float, ...] | None:
    """Return what is left of the models' weights after a division by their sum; None without."""
    configuration = accepted(document)
    shared, specs = configuration.parameters or {}, specs_of(method)
    if "normalize" not in specs or shared.get("normalize", specs["normalize"].default) is not True:
        return None
    given = [
        (one.parameters or {}).get("weight", shared.get("weight"))
        for one in configuration.models or []
        if one.model != configuration.base_model
    ]
    weights = [float(weight) for weight in given if isinstance(weight, int | float)]
    whole = sum(weights)
    if len(weights) < len(given) or not whole:
        return None
    return tuple(round(weight / whole, 9) for weight in weights)


def check_by_planning(space: Space, points: Sequence[Point], options: MergeOptions) -> None:
    """Let mergekit plan each point's merge: reads headers and probes, and merges nothing.

    Not where an input is an adapter, which would have to be merged for it.

    Raises:
        click.ClickException: one of our own methods refused.
        InputError: mergekit does not accept one.
    """
    for point in points:
        configuration = accepted(document_of(space, point))
        if any(model.lora is not None for model in configuration.referenced_models()):
            return
        try:
            architecture = get_architecture_info(configuration, options)
            LoaderCache().setup(options=options)
            for model in configuration.referenced_models():
                LoaderCache().get(model)
            reference = configuration.base_model or configuration.referenced_models()[0]
            config = reference.config(trust_remote_code=options.trust_remote_code)
            MergePlanner(configuration, architecture, options, config).plan_to_disk("")
        except (RuntimeError, ValueError, KeyError, OSError, TypeError) as error:
            method, values = point
            at = ", ".join(f"{name} {value}" for name, value in values.items())
            raise InputError(
                f"mergekit refuses {method}{' at ' if at else ''}{at}: {_said(error)}"
            ) from error


def corners(found: Mapping[str, Mapping[str, Domain]]) -> Iterator[Point]:
    """Yield for every method the point of all lower ends, and that of all upper ones."""
    for method, unknowns in found.items():
        for end in (0, -1):
            yield method, {name: domain.ends()[end] for name, domain in unknowns.items()}
            if not unknowns:
                break


def _checked(dimension: Dimension, method: str, specs: Mapping[str, ParameterSpec]) -> Domain:
    domain = dimension.domain
    for name in sorted(dimension.parameters & specs.keys()):
        bounds = range_of(specs[name])
        for value in domain.ends():
            inside = value in bounds if isinstance(bounds, Interval) else True  # type: ignore[operator]
            if not inside and not isinstance(value, str):
                raise InputError(
                    f"{dimension.name}: {value!r} is outside what {method} takes for {name}, "
                    f"{bounds}"
                )
            try:
                specs[name].validate(value)
            except ValidationError as error:
                raise InputError(
                    f"{dimension.name}: {method} does not take {value!r} for {name}: {_said(error)}"
                ) from error
    return domain


def _said(error: BaseException) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()[:300]
    return first_line(error)
