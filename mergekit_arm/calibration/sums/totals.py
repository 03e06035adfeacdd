"""Sums of all processes, added up and finished into what a directory holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from mergekit_arm.calibration.processes import Job
from mergekit_arm.calibration.sums.sites import Site, site_name
from mergekit_arm.statistics.format import SiteRecord
from mergekit_arm.statistics.kinds.site import site_record

PARTS = "\x1f"
"""Between a site's name and the key of one of its tensors; in neither."""


@dataclass(frozen=True)
class MeasuredSite:
    """A site whose sums are complete, as a directory stores it."""

    name: str
    parameters: list[str]
    """What reads there."""
    record: SiteRecord
    tensors: Mapping[str, Tensor]
    """By key, without the site's name."""


def add_up(sites: Iterable[Site], job: Job, device: torch.device) -> list[MeasuredSite]:
    """Join the sites' sums of all processes, each of which calls this; return them on the first.

    Each process finishes its share, one site at a time, so that beside its own sums it holds the
    totals of two sites at most. Its own stay what they are: should a process die now, they are
    what must be saved. Sites that no process saw an input of are left out.
    """
    shares: dict[int, list[Site]] = {}
    for site in sites:
        shares.setdefault(id(site.plan), []).append(site)
    order = {site_name(group[0].plan): number for number, group in enumerate(shares.values())}
    # Of one width side by side: what is finished at once then takes alike long.
    groups = sorted(shares.values(), key=lambda group: group[0].plan.width)
    measured: list[MeasuredSite] = []
    for first in range(0, len(groups), job.processes):
        mine: list[Site] = []
        for process, group in enumerate(groups[first : first + job.processes]):
            total = [_total(site, job, device) for site in group]
            if process == job.process:
                mine = total
        seen = any(site.tokens for site in mine)
        finished = [finish_site(mine, device)] if seen else []
        measured += _collect(finished, job)
    return sorted(measured, key=lambda site: order[site.name])


def _total(site: Site, job: Job, device: torch.device) -> Site:
    """Return the site with the sums of all processes."""
    if job.processes == 1:
        return site
    site.prepare(device)
    total = Site(site.name, site.plan, site.kinds, site.left_out)
    operations = site.operations()
    total.load_state(
        {key: job.total(value.to(device), operations[key]) for key, value in site.state().items()}
    )
    return total


def _collect(finished: list[MeasuredSite], job: Job) -> list[MeasuredSite]:
    """Return the sites of all processes, in their order, on the first; none on the others."""
    if job.processes == 1:
        return finished
    tensors, record = pack(finished)
    records = job.collect(json.dumps(record).encode())
    return [
        site
        for packed, record in zip(job.collect(save(tensors)), records, strict=True)
        for site in unpack(load(packed), json.loads(record))
    ]


def pack(sites: Iterable[MeasuredSite]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the sites as tensors, on the CPU, and a record for JSON; ``unpack`` reverses it."""
    sites = list(sites)
    tensors = {
        f"{site.name}{PARTS}{key}": value.cpu().contiguous()
        for site in sites
        for key, value in site.tensors.items()
    }
    return tensors, {site.name: [site.parameters, site.record.model_dump()] for site in sites}


def unpack(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> list[MeasuredSite]:
    """Return the sites that ``pack`` was given."""
    return [
        MeasuredSite(
            name,
            parameters,
            SiteRecord.model_validate(found),
            {
                key.removeprefix(f"{name}{PARTS}"): value
                for key, value in tensors.items()
                if key.startswith(f"{name}{PARTS}")
            },
        )
        for name, (parameters, found) in record.items()
    ]


def finish_site(shares: list[Site], device: torch.device) -> MeasuredSite:
    """Turn sums into what is stored: of one input, or stacked, of one for each expert."""
    finished: list[dict[str, Tensor]] = []
    for share in shares:
        share.prepare(device)
        one: dict[str, Tensor] = {}
        for observer in share.observers.values():
            one |= observer.finish()
        finished.append(one)
    plan, tensors = shares[0].plan, finished[0]
    tokens: int | list[int] = shares[0].tokens
    if plan.experts is not None:
        tensors = {key: torch.stack([one[key] for one in finished]) for key in tensors}
        tokens = [share.tokens for share in shares]
    parameters = [reading.parameter for reading in plan.readings]
    record = site_record(shares[0].kinds, plan.width, tokens, tensors, shares[0].left_out)
    return MeasuredSite(site_name(plan), parameters, record, tensors)
