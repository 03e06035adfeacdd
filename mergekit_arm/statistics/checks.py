"""What must be true of a statistics directory before anything of it is used.

Types and ranges of the metadata are the schema's (``format.py``). Here the records are held
against each other and against the tensors, whose shapes and dtypes stand in the files' headers:
opening a directory reads none of them. Values are checked when they are read (``check_values``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from mergekit_arm.statistics.format import Metadata, SiteRecord, WeightRecord
from mergekit_arm.statistics.kinds.base import LEFT_OUT, Kind, TensorSpec
from mergekit_arm.statistics.matching import without_numbers
from mergekit_arm.statistics.probe import PROBE_SIZE

Header = Mapping[str, tuple[bool, tuple[int, ...]]]
"""A tensor's name → whether it is of floating-point numbers, and its shape."""


def problems(
    metadata: Metadata, kinds: Iterable[Kind], probes: str, header: Header
) -> Iterator[str]:
    """Say what is wrong with a directory, one sentence each.

    Args:
        metadata: what the directory says of itself.
        kinds: that were measured.
        probes: name of the tensor of probes.
        header: of every tensor in the files.
    """
    if metadata.digests is not None:
        for name in sorted(metadata.digests.keys() ^ header.keys()):
            lacking = "digest" if name in header else "tensor"
            yield f"it has no {lacking} {'of ' if name in header else ''}{name}"
    if probes not in header:
        yield f"it has no tensor {probes}"
        return
    rows = header[probes][1]
    if not header[probes][0] or len(rows) != 2 or rows[1] != PROBE_SIZE:
        yield f"{probes} has shape {list(rows)}, not (weights, {PROBE_SIZE}) numbers"
        return
    axes: dict[tuple[str, int], tuple[str, int]] = {}
    for name, weight in [*metadata.weights.items(), *metadata.converted.items()]:
        yield from _weight_problems(name, weight, metadata.sites, rows[0])
        if weight.input_axis is not None:
            role = (without_numbers(name), len(weight.shape))
            other, axis = axes.setdefault(role, (name, weight.input_axis))
            if axis != weight.input_axis:
                yield f"input_axis of {name} is {weight.input_axis}, but {axis} of {other}"
    for kind in kinds:
        for name, site in metadata.sites.items():
            if LEFT_OUT not in kind.from_record(site):
                yield from _tensor_problems(kind, name, site, header)


def check_values(spec: TensorSpec, tensor: Tensor) -> str | None:
    """Say what is wrong with a tensor's values; None where nothing is."""
    if not tensor.numel():
        return None
    # One pass, and nothing of the tensor's size: both are NaN where any value is.
    least, greatest = map(float, torch.aminmax(tensor))
    if not (math.isfinite(least) and math.isfinite(greatest)):
        return "are not finite"
    if spec.lowest is not None and least < spec.lowest:
        return f"are below {spec.lowest:g}"
    return None


def fits(spec: TensorSpec, site: SiteRecord, floating: bool, shape: tuple[int, ...]) -> bool:
    """Say whether a stored tensor of ``shape`` can be what ``spec`` describes, at ``site``."""
    wanted = spec.shape
    if isinstance(site.tokens, list):
        wanted = (len(site.tokens), *wanted)
    if spec.at_most:  # how many were stored is for the kind to judge
        wanted, shape = wanted[:-1], shape[:-1] if shape else (-1,)
    return floating == spec.dtype.is_floating_point and shape == wanted


def _tensor_problems(kind: Kind, name: str, site: SiteRecord, header: Header) -> Iterator[str]:
    shapes: dict[str, tuple[int, ...]] = {}
    for key, spec in kind.stored(site.width).items():
        if f"{name}.{key}" not in header:
            yield f"it has no tensor {name}.{key}"
            return
        floating, shapes[key] = header[f"{name}.{key}"]
        if not fits(spec, site, floating, shapes[key]):
            numbers = "numbers" if floating else "integers"
            yield (
                f"{name}.{key} has shape {list(shapes[key])} of {numbers}, which does not fit an "
                f"input of {site.width} channels"
                + (f" and {len(site.tokens)} experts" if isinstance(site.tokens, list) else "")
            )
            return
    trouble = kind.inconsistent(site, shapes)
    if trouble:
        yield f"{name}: {trouble}"


def _weight_problems(
    name: str, weight: WeightRecord, sites: Mapping[str, SiteRecord], probes: int
) -> Iterator[str]:
    if weight.probe >= probes:
        yield f"probe of {name} is row {weight.probe} of {probes}"
    if weight.site is None:
        if weight.reason is None:
            yield f"{name} has neither a site nor a reason why not"
        return
    site = sites.get(weight.site)
    if site is None:
        yield f"{name} was measured at {weight.site}, which is no site"
        return
    axis, shape = weight.input_axis, weight.shape
    if axis is None or axis >= len(shape) or shape[axis] != site.width:
        yield (
            f"input_axis of {name} is {axis}: its shape {shape} has no {site.width} channels there"
        )
    experts = len(site.tokens) if isinstance(site.tokens, list) else None
    if weight.row is not None and (experts is None or weight.row >= experts):
        yield f"row of {name} is {weight.row}, but {weight.site} has {experts or 'no'} rows"
    if weight.row is None and experts is not None and shape[0] != experts:
        yield f"{name} has {shape[0]} rows for the {experts} token counts of {weight.site}"
