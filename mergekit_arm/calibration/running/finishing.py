"""Sums to which nothing will be added any more become what a directory stores.

In *parts*: a walk layer by layer finishes before the layers, behind each of them, and behind all;
a measurement in memory has a single part. Of an unfinished part, the sites that are finished are
kept in pieces, so that a run which is stopped here continues here too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import torch

from mergekit_arm.calibration.running.session import Session
from mergekit_arm.calibration.sums.sites import Site, site_name
from mergekit_arm.calibration.sums.totals import MeasuredSite, add_up, by_input
from mergekit_arm.errors import Failure
from mergekit_arm.machine import free_memory, one_thread_each
from mergekit_arm.statistics.kinds.base import Kind, Observer, TensorSpec

_STAGE = "Finishing inputs"
_WORKSPACE = 8
"""What finishing holds at once, in sizes of the sums: float64 copies and factors of them."""
_TRIAL_TOKENS = 1024
"""Rows of a trial: more than the columns of a sketch, so that none of its work is spared."""


class Finishing:
    """The sites that are finished; the first process keeps their files.

    Every process finishes the same parts in the same order, also one that has no batch.
    """

    def __init__(self, session: Session, device: torch.device, way: str) -> None:
        """Find out what an earlier run has finished; every process calls this.

        ``way`` tells two ways of measuring in one run apart.
        """
        self._session = session
        self._device = device
        progress = session.progress
        parts = progress.finished()
        pieces = [site.name for site in progress.read_pieces(parts)]
        # What the first process has goes for all.
        said = session.job.gather(f"finished {way}", json.dumps([parts, pieces]))[0]
        self._parts, self._pieces = json.loads(said)

    def has(self, part: int) -> bool:
        """Say whether ``close`` has finished ``part`` in an earlier run."""
        return part < int(self._parts)

    def finish(
        self, part: int, sites: list[Site], position: Mapping[str, Any]
    ) -> list[MeasuredSite]:
        """Add up the sums of ``sites`` over all processes, and finish them.

        Args:
            part: number of the part that they make.
            sites: all of the part's.
            position: where the run is: saved with the sums, should it be stopped now.

        Returns:
            All of them on the first process, none on the others.

        Raises:
            Failure: as ``Session.wait`` does.
        """
        session = self._session
        session.wait(f"part {part}", position, sites)
        inputs = by_input(sites)
        order = {site_name(shares[0].plan): number for number, shares in enumerate(inputs)}
        waiting = [one for one in inputs if site_name(one[0].plan) not in self._pieces]
        done, fresh = len(inputs) - len(waiting), list[MeasuredSite]()
        report = partial(session.reports.stage, _STAGE)
        report(done, len(inputs))
        workers = at_once(sites, self._device)
        try:
            with closing(add_up(waiting, session.job, self._device, workers)) as finishing:
                for found in finishing:
                    fresh += found
                    done = min(done + session.job.processes, len(inputs))
                    report(done, len(inputs))
                    session.heed(position, sites)
                    if session.progress.due():
                        self._keep(part, fresh)
                        fresh = []
        except Failure:
            self._keep(part, fresh)
            raise
        if not session.job.main:
            return []
        earlier = session.progress.read_pieces(part)
        self._pieces = []
        return sorted([*earlier, *fresh], key=lambda site: order[site.name])

    def close(self, part: int, sites: list[Site], position: Mapping[str, Any]) -> None:
        """Finish ``sites`` and put the results on the disk, unless an earlier run has.

        Raises:
            Failure: as ``Session.wait`` does.
        """
        if self.has(part):
            return
        session = self._session
        measured = self.finish(part, sites, position)
        if session.job.main:
            session.progress.finish(part, measured)
        # Nobody may go on, and lose these sums, before they are in the finished part.
        session.wait(f"finished part {part}", position, sites)

    def sites(self, count: int) -> list[MeasuredSite]:
        """Return the sites of all ``count`` parts, mapped, on the first process; else none."""
        if not self._session.job.main:
            return []
        progress = self._session.progress
        return [site for part in range(count) for site in progress.read_finished(part)]

    def _keep(self, part: int, fresh: list[MeasuredSite]) -> None:
        if fresh:  # on the first process
            self._session.progress.add_piece(part, fresh)


def at_once(sites: Iterable[Site], device: torch.device) -> int:
    """Return how many of ``sites`` can be finished at once: one on each core that has memory."""
    if device.type != "cpu":
        return 1  # one site's products keep an accelerator busy
    sums = [sum(one.nbytes for one in _sums(site)) for site in sites]
    room: int = free_memory(device) // (_WORKSPACE * max([1, *sums]))
    return max(1, min(torch.get_num_threads(), room))


def finishing_seconds(sites: Iterable[Site], device: torch.device) -> float:
    """Return how long ``sites`` will take to finish, from a trial of each width.

    What the first block has left in the sums would be finished faster than what all blocks will:
    the trial is of random inputs whose second moment has eigenvalues that fall as 1/i.
    """
    sites = list(sites)
    took: dict[tuple[int, tuple[str, ...]], float] = {}
    seconds = 0.0
    for site in sites:
        key = site.plan.width, tuple(kind.name for kind in site.here)
        if key not in took:
            took[key] = sum(trial_seconds(kind, site.plan.width, device) for kind in site.here)
        seconds += took[key]
    return seconds / at_once(sites, device)


def trial_seconds(kind: Kind, width: int, device: torch.device) -> float:
    """Return how long one thread takes to finish ``kind`` at one input of ``width`` channels."""
    observer = kind.observer(width, device)
    if type(observer).finish is Observer.finish:
        return 0.0  # it stores what has accumulated
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(min(width, _TRIAL_TOKENS), width, generator=generator)
    observer.update((x / torch.arange(1, width + 1).sqrt()).to(device))
    with one_thread_each(1):
        began = time.perf_counter()
        observer.finish()
        return time.perf_counter() - began


def _sums(site: Site) -> list[TensorSpec]:
    return [spec for kind in site.here for spec in kind.state(site.plan.width).values()]
