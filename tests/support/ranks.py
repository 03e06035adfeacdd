"""Processes of one job without a launcher, as on hosts of their own; any of them can die."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_arm.calibration import processes as job
from mergekit_arm.calibration.running.session import Session
from mergekit_arm.cli.main import main

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
    commands: Sequence[Sequence[str]], folder: Path, death: Death | None = None
) -> list[Ended]:
    """Run one ``mergekit-arm`` command in each process of a job."""
    # Forked from a server that has imported everything, a process starts at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.models.llama.modeling_llama"])
    job_environment = {
        "WORLD_SIZE": str(len(commands)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    logs = [folder / f"rank-{number}.log" for number in range(len(commands))]
    processes = [
        context.Process(
            target=_take_part,
            args=({**job_environment, "RANK": str(number)}, list(command), logs[number], death),
        )
        for number, command in enumerate(commands)
    ]
    for process in processes:
        process.start()
    until = time.monotonic() + LIMIT
    try:
        for process in processes:
            process.join(max(until - time.monotonic(), 0))
    finally:
        hanging = [number for number, process in enumerate(processes) if process.is_alive()]
        for number in hanging:
            processes[number].kill()
            processes[number].join()
    outputs = [log.read_text() for log in logs]
    for log in logs:
        log.unlink()
    assert not hanging, (hanging, outputs)
    return [
        # The console breaks lines where a terminal would end.
        Ended(process.exitcode or 0, re.sub(r"\s+", " ", output))
        for process, output in zip(processes, outputs, strict=True)
    ]


def _take_part(
    environment: Mapping[str, str], command: list[str], log: Path, death: Death | None
) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    job._BEAT, job._DEAD_AFTER = 0.5, 5.0  # nobody wants to wait a minute for a test
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
    sys.argv = ["mergekit-arm", *command]
    main()


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
