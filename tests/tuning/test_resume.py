"""A search survives what happens to its processes: ``kill -9``, and others beside it."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_arm.files import unfinished
from mergekit_arm.outputs import remove_orphans
from tests.support import forks
from tests.support.tuning import config, lines, tensors, write_family

_KEPT = ("study", "number", "outcome", "method", "values", "scores")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    write_family(folder)
    return folder


def write_config(family: Path, folder: Path, **tuning: Any) -> Path:
    file = folder / "tune.yml"
    file.write_text(yaml.safe_dump(config(family, {"pruning": False, **tuning})))
    return file


def start(file: Path, out: Path) -> forks.Running:
    return forks.start("mergekit-arm", "tune", file, out, "--quiet")


def finished(process: forks.Running) -> None:
    ended = process.end()
    assert ended.returncode == 0, ended.stderr


def trials(out: Path) -> list[dict[str, Any]]:
    """What must not depend on interruptions: all but times, and the numbers of those put back."""
    found = [{key: one[key] for key in _KEPT} for one in lines(out)]
    for study in ("baseline", "tune"):
        for place, one in enumerate(one for one in found if one["study"] == study):
            one["number"] = place
    return found


@pytest.mark.slow
def test_a_killed_search_ends_as_one_that_was_not(family: Path, tmp_path: Path) -> None:
    """With a grid, whose points are known: the same trials and the same model."""
    file = write_config(family, tmp_path, trials=6, sampler="grid")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(start(file, whole))
    deaths = 0
    for lived in (3, 6):
        process = start(file, killed)
        for _ in range(2400):
            done = len(lines(killed)) if (killed / "trials.jsonl").exists() else 0
            if done >= lived or not process.alive():
                break
            time.sleep(0.02)
        deaths += process.kill() == -signal.SIGKILL
    assert deaths
    finished(start(file, killed))
    for one, other in pairs(killed, whole):
        assert {**one, "number": other["number"]} == other
    ours, theirs = tensors(killed / "model"), tensors(whole / "model")
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    left = {path.name for path in killed.iterdir()} - {path.name for path in whole.iterdir()}
    assert left <= {"study.db-wal", "study.db-shm"}


@pytest.mark.long
def test_killed_at_twenty_random_moments(family: Path, tmp_path: Path) -> None:
    """One search, killed again and again, each life a little longer than it takes to begin."""
    file = write_config(family, tmp_path, trials=6, sampler="grid")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begun = time.monotonic()
    finished(start(file, whole))
    life, generator = time.monotonic() - begun, random.Random(4)
    for _ in range(20):
        process = start(file, killed)
        time.sleep(generator.uniform(0, life))
        process.kill()
    finished(start(file, killed))
    for one, other in pairs(killed, whole):
        assert {**one, "number": other["number"]} == other
    ours, theirs = tensors(killed / "model"), tensors(whole / "model")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def pairs(one: Path, other: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Match the trials of two searches by their points."""
    found = {(t["study"], json.dumps(t["values"])): t for t in trials(other)}
    mine = trials(one)
    assert len(mine) == len(found)
    return [(t, found[t["study"], json.dumps(t["values"])]) for t in mine]


@pytest.mark.slow
def test_processes_share_a_search(family: Path, tmp_path: Path) -> None:
    file, out = write_config(family, tmp_path, trials=12, sampler="random"), tmp_path / "out"
    both = [start(file, out) for _ in range(2)]
    for process in both:
        finished(process)
    found = lines(out)
    assert sum(one["study"] == "baseline" for one in found) == 4
    values = [json.dumps(one["values"]) for one in found if one["study"] == "tune"]
    assert len(values) == len(set(values)) == 12
    assert {one["outcome"] for one in found} == {"complete"}
    assert (out / "model" / "config.json").is_file()
    assert not list(out.glob(".work.*"))


@pytest.mark.slow
def test_one_of_two_dies_and_the_other_takes_its_trial(family: Path, tmp_path: Path) -> None:
    file, out = write_config(family, tmp_path, trials=10, sampler="random"), tmp_path / "out"
    first = start(file, out)
    while first.alive() and not (out / "trials.jsonl").exists():
        time.sleep(0.02)
    second = start(file, out)
    time.sleep(0.5)
    first.kill()
    finished(second)
    found = [one for one in lines(out) if one["study"] == "tune"]
    assert [one["outcome"] for one in found] == ["complete"] * 10


def test_unfinished_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """Also of one that had our own number."""
    dead, alive = 2**22 + 1, os.getppid()
    for name in (
        ".best.yml.{}.abcdefgh",
        ".trials.jsonl.{}.a_cdefg1",
        ".tune_state.json.{}.abcdefgh",
        ".work.{}",
    ):
        for process in (dead, alive, os.getpid()):
            (tmp_path / name.format(process)).touch()
    (tmp_path / ".env").touch()
    names = ("best.yml", "trials.jsonl", "tune_state.json")
    remove_orphans([*tmp_path.glob(".work.*"), *unfinished(tmp_path, names)])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".env", *(name for name in left if f".{alive}" in name)}
    assert len(left) == 5
