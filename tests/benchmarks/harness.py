"""Run a process, measure it, compare it with another."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from tests.support.paths import ROOT

TIME = "time"
"""Seconds of the work itself: the process is up and its libraries are imported."""
PROCESSOR = "processor time"
"""Seconds of processor time for the same work, all threads together: steadier on a busy machine."""
WALL = "whole process"
"""Seconds from start to exit of the process."""
MEMORY = "peak memory"
"""Bytes: the largest resident set of the process."""
FORWARD = "forward passes"
"""Seconds of them alone."""
LOADED = "time with loading"
"""Seconds of the work and of loading the model."""
EXTRA = "extra memory"
"""Bytes by which the work raised the process's peak."""

UNITS = {MEMORY: "MB", EXTRA: "MB"}
"""Quantity → unit, where it is not seconds."""

Measured = Mapping[str, Any]
Launch = Callable[..., Measured]
"""``launch(task, **arguments)`` runs one of ``TASKS`` and returns what it took."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    benchmark: str
    quantity: str
    unit: str
    samples: dict[str, list[float]]
    """Label → every measurement, in the order it was made."""
    kind: str
    """``ratio``: first label's median over the second's. ``exponent``: of growth with size."""
    result: float
    lowest: float
    highest: float
    """Least and greatest result of a single round."""
    at_most: float | None


@dataclass(frozen=True)
class Side:
    """One of the things that are compared: a label, and a function that runs it once."""

    label: str
    run: Callable[[], Measured]


class Clock:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {
            TIME: time.perf_counter() - self._wall,
            PROCESSOR: time.process_time() - self._processor,
        }


def peak_bytes() -> int:
    """Return the largest resident set that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def launch(
    task: str, *, processes: int = 1, threads: int | None = None, **arguments: Any
) -> Measured:
    """Run one of ``TASKS`` in a fresh process, or in ``processes`` under torchrun.

    Returns what the task measured itself, and the quantities ``WALL`` and ``MEMORY``
    (under torchrun the largest single process's).

    Raises:
        RuntimeError: it failed; with the end of its output.
    """
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    with tempfile.TemporaryDirectory(prefix="mergekit-arm-benchmark-") as folder:
        result = Path(folder, "result.json")
        module = ["-m", "tests.benchmarks.worker", task, json.dumps(arguments), str(result)]
        if processes > 1:
            module = [
                "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                *module,
            ]  # fmt: skip
        with Path(folder, "output").open("w+") as output:
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *module],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - started
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode != 0:
                output.seek(0)
                raise RuntimeError(f"benchmark task {task} failed:\n{output.read()[-4000:]}")
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            **json.loads(result.read_text()),
            WALL: wall,
            MEMORY: float(usage.ru_maxrss * unit),
        }


def start(command: Sequence[str], **environment: str) -> Measured:
    """Run ``command`` to its end and return the processor time it took."""
    before = os.times()
    subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, check=True
    )
    after = os.times()
    user = after.children_user - before.children_user
    return {PROCESSOR: user + after.children_system - before.children_system}


def compare(
    name: str,
    subject: Side,
    reference: Side,
    at_most: Mapping[str, float | None],
    *,
    rounds: int,
    warm_up: bool = False,
) -> list[Row]:
    """Run ``subject`` and ``reference`` in turn; one row for every quantity in ``at_most``.

    Args:
        at_most: quantity → target of its ratio, or None where there is none.
        rounds: times that each is run.
        warm_up: run each once more, first, and discard that: reads files into the page cache.
    """
    if warm_up:
        subject.run(), reference.run()
    runs = [(subject.run(), reference.run()) for _ in range(rounds)]
    rows = []
    for quantity, target in at_most.items():
        ours = [float(one[quantity]) for one, _ in runs]
        theirs = [float(other[quantity]) for _, other in runs]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        rows.append(
            Row(
                benchmark=name,
                quantity=quantity,
                unit=UNITS.get(quantity, "s"),
                samples={subject.label: ours, reference.label: theirs},
                kind="ratio",
                result=median(ours) / median(theirs),
                lowest=min(ratios),
                highest=max(ratios),
                at_most=target,
            )
        )
    return rows


def growth(
    name: str,
    quantity: str,
    run: Callable[[], Sequence[tuple[str, float, float]]],
    at_most: float,
    *,
    rounds: int,
) -> Row:
    """Fit the exponent p in ``quantity ∝ sizeᵖ`` by least squares over logarithms.

    Args:
        run: one round: (label, size, measured) of every size.
    """
    results = [run() for _ in range(rounds)]
    labels = [label for label, _, _ in results[0]]
    sizes = [size for _, size, _ in results[0]]
    samples = {label: [r[i][2] for r in results] for i, label in enumerate(labels)}
    each = [exponent(sizes, [measured for _, _, measured in r]) for r in results]
    return Row(
        benchmark=name,
        quantity=quantity,
        unit=UNITS.get(quantity, "s"),
        samples=samples,
        kind="exponent",
        result=exponent(sizes, [median(samples[label]) for label in labels]),
        lowest=min(each),
        highest=max(each),
        at_most=at_most,
    )


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the slope of log ``values`` over log ``sizes``."""
    from math import log

    return linear_regression([log(s) for s in sizes], [log(v) for v in values]).slope
