"""What a walk has finished, part by part: before the layers, each layer, and behind them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from mergekit_arm.calibration.running.session import Session
from mergekit_arm.calibration.sums.sites import Site
from mergekit_arm.calibration.sums.totals import MeasuredSite, add_up


class Parts:
    """The sites to which nothing will be added any more; the first process keeps their files.

    Every process closes the same parts in the same order, also one that has no batch.
    """

    def __init__(self, session: Session, device: torch.device) -> None:
        """Find out what an earlier run has finished; every process calls this."""
        self._session = session
        self._device = device
        # What the first process has goes for all.
        self._finished = int(session.job.gather("finished", str(session.progress.finished()))[0])

    def has(self, part: int) -> bool:
        """Say whether an earlier run has finished ``part``."""
        return part < self._finished

    def close(self, part: int, sites: list[Site], position: Mapping[str, Any]) -> None:
        """Add up the sums of ``sites`` over all processes and put the results on the disk.

        Args:
            position: where the walk is: saved with the sums, should another process die now.

        Raises:
            Failure: as ``Session.wait`` does.
        """
        if self.has(part):
            return
        session = self._session
        wait = partial(session.wait, position=position, sites=sites)
        wait(f"part {part}")
        measured = add_up(sites, session.job, self._device)
        if session.job.main:
            session.progress.finish(part, measured)
        # Nobody may go on, and lose these sums, before they are in the finished part.
        wait(f"finished part {part}")

    def sites(self, count: int) -> list[MeasuredSite]:
        """Return the sites of all ``count`` parts, mapped, on the first process; else none."""
        if not self._session.job.main:
            return []
        progress = self._session.progress
        return [site for part in range(count) for site in progress.read_finished(part)]
