"""How far a calibration is: bars on a terminal, and elsewhere a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mergekit_arm.units import duration_text

EVERY = 30.0
"""Seconds between two lines where there is no terminal."""
_TOKENS = "Calibrating"


class Display:
    """Shows what a calibration reports, for the duration of ``with``.

    Bars begin with the first count. What comes before them, loading above all, is a line each:
    libraries draw bars of their own there, which two at once would spoil.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,}/{task.total:,}{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=60,
        )
        self._tasks: dict[str, TaskID] = {}
        self._begun: dict[str, tuple[int, float]] = {}
        """How much was done, and when, at the first count of each kind of work."""
        self._said = clock()

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tasks:
            self._bars.stop()

    def tokens(self, done: int, total: int) -> None:
        """Take a count of tokens."""
        self._count(_TOKENS, done, total, " tokens")

    def stage(self, name: str, done: int, total: int) -> None:
        """Take the name of other work; a count, where ``total`` is not 0."""
        if total:
            self._count(name, done, total, "")
        else:
            self._line(f"{name} …")

    def whole(self, name: str, done: int, total: int, note: str) -> None:
        """Take a count of pieces of work and a note on them, drawn on a terminal alone."""
        if self._console.is_terminal:
            self._draw(name, done, total, note)

    def _count(self, name: str, done: int, total: int, unit: str) -> None:
        now = self._clock()
        if self._begun.get(name, (done + 1, now))[0] > done:  # the first, or another layer's
            self._begun[name] = (done, now)
        before, since = self._begun[name]
        speed = (done - before) / (now - since) if done > before and now > since else 0.0
        if self._console.is_terminal:
            self._draw(name, done, total, f"{unit}, {speed:,.0f}/s" if unit and speed else unit)
        elif now - self._said >= EVERY:
            rate = f", {speed:,.{0 if unit else 2}f}{unit}/s" if speed else ""
            left = f", {duration_text((total - done) / speed)} left" if speed else ""
            self._line(f"{name}: {done:,} of {total:,}{unit}{rate}{left}")

    def _draw(self, name: str, done: int, total: int, rate: str) -> None:
        self._bars.start()
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(name, total=total, rate=rate)
        # Work that is over may come again, as behind every layer; in between it takes no line.
        visible = done < total
        self._bars.update(
            self._tasks[name], completed=done, total=total, rate=rate, visible=visible
        )

    def _line(self, text: str) -> None:
        self._said = self._clock()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
