"""Processes forked from one that has imported everything, so that a command starts at once.

A process started anew imports torch, transformers and mergekit: some seven seconds of processor
time. Python keeps one fork server for each test process, with what the first to ask wants
imported, so that all tests ask here.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

_IMPORTED = (
    "pytest",
    "click.testing",
    "tests.support.forks",
    "mergekit.scripts.run_yaml",
    "mergekit_arm.calibration.calibrate",
    "mergekit_arm.streaming.stream",
    "mergekit_arm.tuning.tune",
    "mergekit_arm.cli.tables.calibration",
    "mergekit_arm.cli.tables.stream",
    "mergekit_arm.cli.tables.tune",
    # What the libraries themselves import only when it is needed.
    "datasets",
    "matplotlib.backends.backend_agg",
    "torch.distributed",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)
_PROGRAMS = {
    "mergekit-arm": "mergekit_arm.cli.main:main",
    "mergekit-yaml": "mergekit.scripts.run_yaml:main",
}
LIMIT = 400.0
"""Seconds after which a command hangs; a machine with other work on it is slow."""


def server() -> ForkServerContext:
    """Return the context whose processes begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    return context


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it wrote."""

    returncode: int
    """Of a signal, its number below zero."""
    stdout: str
    stderr: str


class Running:
    """A function in a process of its own, in ``cwd`` and with this process's environment."""

    def __init__(
        self,
        function: Callable[..., None],
        *arguments: Any,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="said-")
        place = (str(cwd or Path.cwd()), {**os.environ, **(environment or {})}, self._folder.name)
        self.process = server().Process(target=_live, args=(*place, function, arguments))
        self.process.start()

    def said(self) -> str:
        """Return what it has written to standard error until now."""
        file = Path(self._folder.name, "stderr")
        return file.read_text() if file.exists() else ""

    def alive(self) -> bool:
        return self.process.is_alive()

    def kill(self) -> int:
        """End it by ``kill -9``; return its status."""
        self.process.kill()
        self.process.join()
        return int(self.process.exitcode or 0)

    def end(self, limit: float = LIMIT) -> Ended:
        """Wait for its end.

        Raises:
            AssertionError: it has not come within ``limit`` seconds.
        """
        self.process.join(limit)
        hangs = self.process.exitcode is None
        if hangs:
            self.kill()
        said = [Path(self._folder.name, name).read_text() for name in ("stdout", "stderr")]
        self._folder.cleanup()
        assert not hangs, f"hangs: {said}"
        return Ended(int(self.process.exitcode or 0), *said)


def start(program: str, *arguments: object, **place: Any) -> Running:
    """Start ``mergekit-arm`` or ``mergekit-yaml``; ``place`` as :class:`Running` has it."""
    return Running(_command, program, [str(one) for one in arguments], **place)


def run(program: str, *arguments: object, limit: float = LIMIT, **place: Any) -> Ended:
    """Run ``mergekit-arm`` or ``mergekit-yaml`` to its end, within ``limit`` seconds."""
    return start(program, *arguments, **place).end(limit)


def _command(program: str, arguments: list[str]) -> None:
    sys.argv = [program, *arguments]
    pkgutil.resolve_name(_PROGRAMS[program])()


def _live(
    cwd: str,
    environment: dict[str, str],
    said: str,
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(Path(said, name), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    function(*arguments)
