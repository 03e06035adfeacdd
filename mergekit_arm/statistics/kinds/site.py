"""The record of a site in ``activation_stats.json``, put together from what its kinds say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mergekit_arm.statistics.format import SiteRecord
from mergekit_arm.statistics.kinds.base import LEFT_OUT, Kind


def site_record(
    kinds: Iterable[Kind],
    width: int,
    tokens: int | list[int],
    tensors: Mapping[str, Tensor],
    left_out: Mapping[str, str],
) -> SiteRecord:
    """Return what the metadata say of a site.

    Args:
        kinds: that were measured in the run.
        width: of the input.
        tokens: rows seen, or a count for each expert.
        tensors: what is stored of the site, by key.
        left_out: names of the kinds that were not measured there, and why.
    """
    fields = merge_fields(
        kind.to_record(
            {LEFT_OUT: left_out[kind.name]} if kind.name in left_out else kind.describe(tensors)
        )
        for kind in kinds
    )
    return SiteRecord(width=width, tokens=tokens, **fields)


def measured_widths(kind: Kind, sites: Iterable[SiteRecord]) -> set[int]:
    """Return the widths of the inputs at which ``kind``, one of the run's, was measured."""
    return {site.width for site in sites if LEFT_OUT not in kind.from_record(site)}


def merge_fields(fields: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields that several kinds put into one record."""
    merged: dict[str, Any] = {}
    for one in fields:
        kinds = {**merged.get("kinds", {}), **one.get("kinds", {})}
        merged |= one
        if kinds:
            merged["kinds"] = kinds
    return merged
