"""One run at a time saves its progress beside an OUT."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_arm.calibration.running.progress import SavedProgress
from mergekit_arm.errors import InputError


def progress(folder: Path) -> SavedProgress:
    return SavedProgress(folder, {"model": "m"}, every=0)


def test_a_second_run_is_refused_also_after_progress_was_discarded(tmp_path: Path) -> None:
    """``--force`` discards the progress of another run while it holds the lock."""
    folder = tmp_path / "not" / "yet" / "out.partial"
    first = progress(folder)
    with first.alone():
        for _ in range(2):
            with pytest.raises(InputError, match="another calibration"), progress(folder).alone():
                pass
            first.discard()
    assert not list(tmp_path.iterdir())
    with progress(folder).alone():
        pass
