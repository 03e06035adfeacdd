"""What happens around the forward passes: reports, signals, saved progress, other processes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

from transformers import PreTrainedModel

from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.processes import Job, PeerLost
from mergekit_arm.calibration.running.preflight import Preflight
from mergekit_arm.calibration.running.progress import SavedProgress, Snapshot
from mergekit_arm.calibration.sums.batches import Span, plan_spans
from mergekit_arm.calibration.sums.sites import Site, chosen_kinds
from mergekit_arm.data.blocks import Corpus
from mergekit_arm.data.sample import TokenSample
from mergekit_arm.errors import Failure
from mergekit_arm.models.calling import token_counts

TOKENS_PER_BATCH = 4096

ProgressReport = Callable[[int, int], None]
"""Called after every batch with tokens done and tokens in all."""

StageReport = Callable[[str, int, int], None]
"""Called where other work begins, and on its way: its name, how much is done, and how much there
is, which is 0 where nobody knows."""


@dataclass(frozen=True)
class Reports:
    """Where reports go."""

    say: Callable[[str], None]
    """One-line notes for the user."""
    progress: ProgressReport
    preflight: Callable[[Preflight], None]
    stage: StageReport

    @staticmethod
    def of(
        say: Callable[[str], None] | None = None,
        progress: ProgressReport | None = None,
        preflight: Callable[[Preflight], None] | None = None,
        stage: StageReport | None = None,
    ) -> Reports:
        """Return reports that go to what is given, and otherwise nowhere."""
        return Reports(
            say or (lambda note: None),
            progress or (lambda done, total: None),
            preflight or (lambda estimate: None),
            stage or (lambda name, done, total: None),
        )


class SavedBeside(Protocol):
    """Files that saved progress refers to."""

    def persist(self) -> None:
        """Write what progress that is about to be saved will refer to."""

    def settle(self) -> None:
        """Remove what only earlier progress referred to."""


class DryRun(Exception):
    """The preflight is done and nothing more was asked for."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, so that what lies on the disk for a time is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@dataclass(repr=False)  # Python's `signal` prints a handler: here it would be all of the corpus
class Session:
    """One measurement on one process; both ways of walking through a model use it."""

    options: CalibrationOptions
    corpus: Corpus
    job: Job
    progress: SavedProgress
    reports: Reports
    beside: SavedBeside | None = None
    """What else the saved position refers to."""
    seconds: float = 0.0
    """Spent on forward passes, by earlier runs of the same command too."""
    _stop: str | None = None
    _since: float = field(default_factory=time.perf_counter)

    def samples(self, model: PreTrainedModel) -> list[TokenSample]:
        """Return the tokens that sampled kinds of statistics see.

        One sample; of an encoder–decoder one of the encoder's tokens and one of the decoder's.
        None where no kind is sampled.
        """
        if not any(kind.sampled for kind in chosen_kinds(self.options)):
            return []
        counts = [
            token_counts(model, length, self.corpus.extra(block))
            for block, length in enumerate(self.corpus.lengths)
        ]
        return [
            TokenSample(
                lengths,
                self.options.subspace_tokens,
                seed=self.options.seed,
                skip_first=self.options.skip_first,
            )
            for lengths in zip(*counts, strict=True)
        ]

    def spans(self) -> list[Span]:
        """Return this process's batches, of ``--batch-size`` or ``TOKENS_PER_BATCH``."""
        by_tokens = max(1, TOKENS_PER_BATCH // self.corpus.lengths[-1])
        # Few blocks are shared out evenly rather than batched well.
        fair = -(-len(self.corpus.blocks) // self.job.processes)
        return plan_spans(
            self.corpus.lengths,
            # What has images or audio beside it comes one by one.
            1 if self.corpus.extras else self.options.batch_size or min(by_tokens, fair),
            process=self.job.process,
            processes=self.job.processes,
        )

    def tokens(self, spans: Iterable[Span]) -> int:
        """Return how many tokens ``spans`` hold."""
        return sum(self.corpus.lengths[span.first] * span.count for span in spans)

    def resume(self) -> Snapshot | None:
        """Return what an earlier run of the same command has saved."""
        snapshot = self.progress.load()
        if snapshot:
            self.seconds = snapshot.position["seconds"]
        return snapshot

    def preflight(self, estimate: Preflight) -> None:
        """Show the estimate; end a dry run.

        Raises:
            DryRun: nothing more was asked for.
        """
        self.reports.preflight(estimate)
        if self.options.dry_run:
            raise DryRun

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let a request to stop wait for the end of the batch, when progress can be saved.

        A second Ctrl-C stops at once.
        """
        self._since = time.perf_counter()
        if threading.current_thread() is not threading.main_thread():
            yield  # Python delivers signals to the main thread only
            return
        previous = {
            number: signal.signal(number, self._request)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def after_batch(
        self, tokens: int, total: int, position: Mapping[str, Any], sites: Iterable[Site]
    ) -> None:
        """Report, save when it is time, and stop when that was asked for.

        Args:
            tokens: done so far.
            total: in all.
            position: where the loop is, in JSON; it comes back with the snapshot.
            sites: whose sums go with it.

        Raises:
            Failure: a signal asked to stop, or another process is gone; progress is saved.
        """
        self.reports.progress(tokens, total)
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        self.heed(position, sites)
        if self.progress.due():
            self._save(position, sites)
            self._since = time.perf_counter()

    def wait(self, stage: str, position: Mapping[str, Any], sites: Iterable[Site]) -> None:
        """Wait for all processes at ``stage``, ready to save should that be in vain.

        Raises:
            Failure: as ``after_batch`` does.
        """
        self.job.wait(stage, lambda: self.heed(position, sites))

    def after_last(self, position: Mapping[str, Any], sites: Iterable[Site]) -> None:
        """Save, so that nothing that follows can cost the sums; wait until all are through.

        Raises:
            Failure: as ``after_batch`` does.
        """
        self._save(position, sites)
        self.wait("measured", position, sites)

    def heed(self, position: Mapping[str, Any], sites: Iterable[Site]) -> None:
        """Save and stop if a signal asked for that, or another process is gone.

        Raises:
            Failure: it stops; progress is saved.
        """
        try:
            self.job.check()
        except PeerLost as lost:
            self._save(position, sites)
            raise PeerLost(f"{lost.message}; {self.saved_note()}") from lost
        if self._stop:
            self._save(position, sites)
            raise Failure(f"stopped by {self._stop}; {self.saved_note()}")

    def saved_note(self) -> str:
        """Return where progress is and what to do with it, to end a message."""
        return f"progress is in {self.progress.folder}: the same command continues"

    def _save(self, position: Mapping[str, Any], sites: Iterable[Site]) -> None:
        if self.beside:
            self.beside.persist()
        self.progress.save({**position, "seconds": self.seconds}, sites)
        if self.beside:
            self.beside.settle()

    def _request(self, number: int, _frame: FrameType | None) -> None:
        if self._stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._stop = signal.Signals(number).name
