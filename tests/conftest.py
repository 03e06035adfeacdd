"""Tiny models and data that every test file shares."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from mergekit.io.tasks import LoaderCache

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from tests.support.models import VOCABULARY, perturbed, tiny_llama

# Test processes share the cores. Two that each use them all spend most of their time waiting for
# each other; commands that tests start inherit the variable.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = max(1, (os.cpu_count() or 1) // _WORKERS)
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))))


# A change is judged by the same examples each time, however slow the machine is; others are drawn
# with --hypothesis-profile default.
settings.register_profile(
    "fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")


LONGEST_FIRST = (
    "tests/calibration/test_processes.py",
    "tests/real/",
    "tests/streaming/test_kill.py",
    "tests/tuning/test_tune.py",
    "tests/demo/",
    "tests/calibration/test_process_matrix.py",
    "tests/test_installation.py",
)
"""Begun last, they would keep one process busy while the other has nothing left."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let what is long count as slow, and begin with what takes longest.

    ``-m "not slow"`` takes the place of ``-m "not long"``, and must leave out both.
    """
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker("slow")
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST_FIRST))


@pytest.fixture(autouse=True)
def no_model_of_another_test() -> Iterator[None]:
    """mergekit keeps open models by the name in the configuration, and tests share names."""
    yield
    LoaderCache.loaders.clear()


@pytest.fixture(scope="session")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of 32 random token ids."""
    path = tmp_path_factory.mktemp("data") / "tokens.jsonl"
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(VOCABULARY, (12, 32), generator=generator).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def measure(token_file: Path) -> Callable[..., Path]:
    """Return a function that calibrates a saved model on ``token_file``."""

    def run(model: Path, out: Path, **options: object) -> Path:
        settings: dict[str, Any] = {"dataset": str(token_file), **options}
        calibrate(CalibrationOptions(model=str(model), out=str(out), **settings))
        return out

    return run


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]) -> Path:
    """A directory with base, two fine-tunes ``a`` and ``b``, and the base's ``stats``."""
    folder = tmp_path_factory.mktemp("family")
    base = tiny_llama(0)
    base.save_pretrained(folder / "base")
    perturbed(base, 1).save_pretrained(folder / "a")
    perturbed(base, 2).save_pretrained(folder / "b")
    measure(folder / "base", folder / "stats")
    return folder
