"""``kill -9`` at any moment, then the same command again: the same bytes in the end.

Children are forked from a server that has imported everything, so that a life costs less than
a second. They are killed either at random moments or, more searchingly, at every single
operation that changes the disk.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergekit_arm.streaming import StreamOptions, stream
from tests.support.forks import server
from tests.support.streams import config, digest, write_run, write_tokens

_CHANGING = ("rename", "replace", "unlink", "rmdir", "mkdir", "link", "open")


def live(document: dict[str, Any], out: str, dies_at: int | None, report: Any) -> None:
    """Run the stream; with ``dies_at``, kill this process before that change to the disk."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            # Elsewhere, caches of fonts and data sets come and go from life to life.
            if any(str(arg).startswith(out) for arg in args) or "dir_fd" in kwargs:
                count += 1
            if count == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in _CHANGING:
        setattr(os, name, counted(getattr(os, name)))
    stream(document, out, StreamOptions(keep="all"))
    if report is not None:
        report.send(count)


@pytest.fixture(scope="module")
def scene(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Path, int]:
    """A stream with everything in it, its uninterrupted result, and how often it touched disk."""
    folder = tmp_path_factory.mktemp("scene")
    write_run(folder, (1, 2))
    document = config(
        folder,
        merge_method="aim",
        parameters={"omega": 0.3},
        calibration={"dataset": str(folder / "tokens.jsonl"), "refresh": 2},
        evaluation={
            "dataset": str(write_tokens(folder / "heldout.jsonl", 7, rows=2)),
            "backtrack": True,
        },
        dtype="bfloat16",
    )
    receive, send = server().Pipe(duplex=False)
    child = server().Process(target=live, args=(document, str(folder / "whole"), None, send))
    child.start()
    child.join()
    assert child.exitcode == 0
    return document, folder / "whole", receive.recv()


def finish(document: dict[str, Any], out: Path) -> None:
    child = server().Process(target=live, args=(document, str(out), None, None))
    child.start()
    child.join()
    assert child.exitcode == 0


def same(whole: Path, out: Path) -> None:
    """Compare all files; configurations name their own directory and are compared without it."""
    for path in [*out.rglob("config.yml"), *whole.rglob("config.yml")]:
        root = whole if path.is_relative_to(whole) else out
        path.write_text(path.read_text().replace(str(root), "OUT"))
    assert digest(out) == digest(whole)


def kill_at_changes(
    scene: tuple[dict[str, Any], Path, int], tmp_path: Path, moments: list[int]
) -> None:
    document, whole, _ = scene
    for moment in moments:
        out = tmp_path / f"killed-{moment}"
        child = server().Process(target=live, args=(document, str(out), moment, None))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL, moment
        finish(document, out)
        same(whole, out)


def test_killed_between_changes_to_the_disk(scene: Any, tmp_path: Path) -> None:
    changes = scene[2]
    generator = random.Random(0)
    kill_at_changes(scene, tmp_path, generator.sample(range(1, changes), 3))


@pytest.mark.long
def test_killed_before_every_change_to_the_disk(scene: Any, tmp_path: Path) -> None:
    kill_at_changes(scene, tmp_path, list(range(1, scene[2] + 1)))


def kill_at_random(scene: Any, tmp_path: Path, kills: int, seed: int) -> None:
    """Kill one stream again and again, each life getting a little further, then let it end."""
    document, whole, _ = scene
    generator = random.Random(seed)
    out = tmp_path / "out"
    for _ in range(kills):
        child = server().Process(target=live, args=(document, str(out), None, None))
        child.start()
        time.sleep(generator.uniform(0.05, 1.5))
        child.kill()
        child.join()
    finish(document, out)
    same(whole, out)


def test_killed_again_and_again(scene: Any, tmp_path: Path) -> None:
    kill_at_random(scene, tmp_path, kills=4, seed=1)


@pytest.mark.parametrize(
    "kills",
    [pytest.param(3, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.long)],
)
def test_killed_at_random_moments(scene: Any, tmp_path: Path, kills: int) -> None:
    document, whole, _ = scene
    generator = random.Random(2)
    begun = time.monotonic()
    finish(document, tmp_path / "timed")
    life = time.monotonic() - begun
    for number in range(kills):
        out = tmp_path / f"out-{number}"
        child = server().Process(target=live, args=(document, str(out), None, None))
        child.start()
        time.sleep(generator.uniform(0, life))
        child.kill()
        child.join()
        finish(document, out)
        same(whole, out)
