"""Every reader of files for some minutes under atheris, where that is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imatrix.test_imatrix import sums, write_dat, write_gguf
from tests.support.paths import EXAMPLES

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None,
        reason="atheris is not installed (pip install atheris): test_fuzz.py goes without",
    ),
]

SECONDS = int(os.environ.get("FUZZ_SECONDS", "300"))


def write_corpus(target: str, folder: Path, family: Path) -> None:
    """Save good files to begin with, and what must lie beside them."""
    inputs, beside = folder / "inputs", folder / "beside"
    inputs.mkdir(), beside.mkdir()
    if target in ("metadata", "tensors"):
        damaged = {"metadata": "activation_stats.json", "tensors": "model.safetensors"}[target]
        for file in (family / "stats").iterdir():
            to = inputs if file.name == damaged else beside
            (to / file.name).write_bytes(file.read_bytes())
    elif target == "imatrix":
        write_gguf(inputs / "x.gguf", sums(magnitudes=True))
    elif target == "imatrix-dat":
        values = {name.removesuffix(".in_sum2"): (one[0], 3) for name, one in sums().items()}
        write_dat(inputs / "x.dat", values)
    else:
        pattern = {"stream": "stream*.yml", "tune": "tune*.yml", "merge": "*.yml"}[target]
        for file in EXAMPLES.glob(pattern):
            (inputs / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    "target", ["metadata", "tensors", "imatrix", "imatrix-dat", "stream", "tune", "merge"]
)
def test_readers(target: str, family: Path, tmp_path: Path) -> None:
    write_corpus(target, tmp_path, family)
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.hostile.coverage_guided", target, str(tmp_path),
            f"-max_total_time={SECONDS}", "-timeout=30", "-rss_limit_mb=4096",
            f"-artifact_prefix={tmp_path}/",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    ran = re.search(r"Done (\d+) (?:runs )?in \d+ second", done.stderr)
    print(target, ran[0] if ran else "")  # noqa: T201  what pytest -s shows
    assert done.returncode == 0, done.stderr[-3000:]
    assert ran
    assert int(ran[1]) > 0
