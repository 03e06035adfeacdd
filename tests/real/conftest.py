"""The real model and two fine-tunes of it, made once for all tests that need them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from mergekit_arm.demo.text import DomainText, standard_library
from tests.real import smollm2
from tests.real.smollm2 import EVERY, fine_tune

STEPS = {"prose": 16, "code": 8}
"""Of each fine-tune."""


@pytest.fixture(scope="session")
def base() -> Path:
    """SmolLM2-135M-Instruct: bfloat16, tied embeddings, tokenizer with chat template."""
    try:
        return smollm2.smollm2()
    except smollm2.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def corpora() -> dict[str, DomainText]:
    """Real text from this machine's Python: general, prose and code."""
    return standard_library(characters=200_000)


@pytest.fixture(scope="session")
def run(
    base: Path, corpora: dict[str, DomainText], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Path]]:
    """Return a function that fine-tunes on a domain, once: a directory of ``checkpoint-N``.

    Processes that share the tests share the directories, and the last to need them deletes them:
    pytest keeps the folders of three sessions, which would be ten gigabytes.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder /= "fine-tunes"
    users = folder / "users"
    with FileLock(folder.with_suffix(".lock")):
        users.mkdir(parents=True, exist_ok=True)
        mine = users / str(os.getpid())
        mine.touch()

    def once(domain: str) -> Path:
        done = folder / f"{domain}.done"
        with FileLock(folder / f"{domain}.lock"):
            if not done.exists():
                steps = STEPS[domain]
                saved = range(EVERY, steps + 1, EVERY)
                fine_tune(base, corpora[domain].train, folder / domain, steps, saved)
                done.touch()
        return folder / domain

    yield once
    with FileLock(folder.with_suffix(".lock")):
        mine.unlink()
        if not any(users.iterdir()):
            shutil.rmtree(folder)


@pytest.fixture(scope="session")
def variants(run: Callable[[str], Path]) -> dict[str, Path]:
    """The last checkpoint of a fine-tune on prose, and of one on code."""
    return {domain: run(domain) / f"checkpoint-{steps}" for domain, steps in STEPS.items()}
