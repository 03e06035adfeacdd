"""Sums of all processes, added up and finished into what a directory holds."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from mergekit_arm.calibration.processes import Job
from mergekit_arm.calibration.sums.sites import Site, site_name
from mergekit_arm.machine import one_thread_each
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


def add_up(
    inputs: Iterable[list[Site]], job: Job, device: torch.device, workers: int
) -> Generator[list[MeasuredSite], None, None]:
    """Join the sums of all processes, each of which calls this; yield them on the first.

    Each process finishes its share. A single one finishes ``workers`` inputs at once, each on one
    thread: the numbers do not depend on how many cores there are, and small decompositions gain
    nothing from several. Beside its own sums a process holds the totals of two inputs at most.
    Its own stay what they are: should a process die now, they are what must be saved.

    Args:
        inputs: the sites of each input, as ``by_input`` returns them.
        job: the processes.
        device: where sums of inputs that this process has not seen are made.
        workers: inputs at once, in a single process.

    Yields:
        What has been finished since: of some inputs at once with several processes. Nothing of
        an input that no process saw, and nothing on the processes but the first.
    """
    # Of one width side by side: what is finished at once then takes alike long.
    inputs = sorted(inputs, key=lambda shares: shares[0].plan.width)
    with one_thread_each(workers) as pool:
        if job.processes == 1:
            for shares in inputs:
                for site in shares:
                    if site.tokens:
                        site.prepare(device)  # here, for what sites share is made once
            yield from pool.map(partial(_finish_seen, device=device), inputs)
            return
        for first in range(0, len(inputs), job.processes):
            mine: list[Site] = []
            for process, shares in enumerate(inputs[first : first + job.processes]):
                total = [_total(site, job, device) for site in shares]
                if process == job.process:
                    mine = total
            yield _collect(_finish_seen(mine, device), job)


def by_input(sites: Iterable[Site]) -> list[list[Site]]:
    """Return the sites of every input together: one, or one for each of its experts."""
    shares: dict[int, list[Site]] = {}
    for site in sites:
        shares.setdefault(id(site.plan), []).append(site)
    return list(shares.values())


def _finish_seen(shares: list[Site], device: torch.device) -> list[MeasuredSite]:
    """Return the finished input; nothing where nothing was seen of it."""
    if not any(site.tokens for site in shares):
        return []
    with torch.inference_mode():  # which is a thread's own
        return [finish_site(shares, device)]


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
