"""Processes of one job without a launcher, as on hosts of their own; any of them can die."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_arm.calibration import heartbeat, processes
from mergekit_arm.calibration.running.session import Session
from mergekit_arm.cli.main import main
from tests.support.forks import server

LIMIT = 120.0
"""Seconds after which a job hangs; a machine with other work on it is slow."""

_TORCH = re.compile(r"^(\[rank\d+\]:)?(\[W|frame #).*\n?", re.M)


@dataclass(frozen=True)
class Death:
    """What happens to one process at one of its batches."""

    process: int
    batch: int
    kill: bool = True
    """By ``kill -9``; otherwise an exception."""
    after: Path | None = None
    """A file of another process that must be there first."""


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int
    output: str

    @property
    def batches(self) -> int:
        return self.output.count("BATCH")

    @property
    def said(self) -> str:
        """The output without what torch's C++ logs of a connection that has closed."""
        return _TORCH.sub("", self.output).strip()


def run_ranks(
    commands: Sequence[Sequence[str]],
    folder: Path,
    death: Death | None = None,
    prepare: Callable[[], None] | None = None,
) -> list[Ended]:
    """Run one ``mergekit-arm`` command in each process of a job."""
    return run_jobs([commands], folder, death, prepare)[0]


def run_jobs(
    jobs: Sequence[Sequence[Sequence[str]]],
    folder: Path,
    death: Death | None = None,
    prepare: Callable[[], None] | None = None,
) -> list[list[Ended]]:
    """Run jobs one after the other, each a command for every one of its processes.

    All within ``LIMIT``. The processes are the same ones for all jobs, which saves starting
    them; a job ends when its processes have. Each process calls ``prepare`` first.
    """
    context = server()
    logs = {
        (job, rank): folder / f"job-{job}-rank-{rank}.log"
        for job, commands in enumerate(jobs)
        for rank in range(len(commands))
    }
    ports = [free_port() for _ in jobs]
    started = []
    for rank in range(max(map(len, jobs))):
        tasks = [
            _Task(
                {
                    "WORLD_SIZE": str(len(commands)),
                    "RANK": str(rank),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(ports[job]),
                },
                list(commands[rank]),
                logs[job, rank],
            )
            for job, commands in enumerate(jobs)
            if rank < len(commands)
        ]
        started.append(context.Process(target=_take_part, args=(tasks, death, prepare)))
    for process in started:
        process.start()
    until = time.monotonic() + LIMIT
    try:
        for process in started:
            process.join(max(until - time.monotonic(), 0))
    finally:
        hanging = [number for number, process in enumerate(started) if process.is_alive()]
        for number in hanging:
            started[number].kill()
            started[number].join()
    outputs = {key: log.read_text() if log.exists() else None for key, log in logs.items()}
    for log in logs.values():
        log.unlink(missing_ok=True)
    if hanging:
        stuck = min(job for (job, _), output in outputs.items() if "STATUS" not in (output or ""))
        raise AssertionError(f"job {stuck} hangs: {jobs[stuck][0]}: {_of_job(stuck, outputs)}")
    ended: list[list[Ended]] = []
    for job, commands in enumerate(jobs):
        ended.append([])
        for rank, output in zip(range(len(commands)), _of_job(job, outputs), strict=True):
            status = re.search(r"^STATUS (\d+)$", output or "", re.M)
            code = int(status[1]) if status else started[rank].exitcode or 0
            text = re.sub(r"^STATUS \d+$", "", output or "", flags=re.M)
            # The console breaks lines where a terminal would end.
            ended[-1].append(Ended(code, re.sub(r"\s+", " ", text)))
    return ended


@dataclass(frozen=True)
class _Task:
    """One command of one process, as a launcher would start it."""

    environment: Mapping[str, str]
    command: list[str]
    log: Path


def _of_job(job: int, outputs: Mapping[tuple[int, int], str | None]) -> list[str | None]:
    return [output for (number, _), output in sorted(outputs.items()) if number == job]


def _take_part(
    tasks: Sequence[_Task], death: Death | None, prepare: Callable[[], None] | None
) -> None:
    if prepare:
        prepare()
    # Nobody wants to wait a minute for a test.
    torch.set_num_threads(1)  # several processes share the cores
    faulthandler.dump_traceback_later(LIMIT - 5, file=2)  # where one that hangs does
    heartbeat.BEAT, heartbeat.DEAD_AFTER, processes.POLL = 0.5, 5.0, 0.02
    plain, count = Session.after_batch, 0

    def after_batch(self: Session, *arguments: Any) -> None:
        nonlocal count
        count += 1
        if death and (death.process, death.batch) == (self.job.process, count):
            while death.after and not death.after.exists():
                time.sleep(0.05)
            if death.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("a broken cable")
        os.write(2, b"BATCH\n")
        plain(self, *arguments)

    Session.after_batch = after_batch  # type: ignore[method-assign]
    for task in tasks:
        os.environ.update(task.environment)
        descriptor = os.open(task.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        sys.argv = ["mergekit-arm", *task.command]
        try:
            main()
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(2, f"\nSTATUS {end.code or 0}\n".encode())


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
