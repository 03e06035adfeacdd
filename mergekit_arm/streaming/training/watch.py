"""Follow a training run: take its checkpoints as they appear, before they are rotated away."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mergekit_arm.errors import Failure
from mergekit_arm.files import remove
from mergekit_arm.models.contents import missing_part, weight_files
from mergekit_arm.streaming.layout import END_MARKER
from mergekit_arm.streaming.options import WatchOptions
from mergekit_arm.streaming.training.checkpoints import (
    TRAINER_STATE,
    RunCheckpoint,
    is_last,
    numbered_checkpoints,
    trained_checkpoint,
)

_ABANDONED = 900.0  # seconds: no copy of one file takes so long, so its process is gone

# What a trainer needs to go on and a merge does not.
_TRAINING_ONLY = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")


@dataclass
class Watch:
    """Takes the run's checkpoints in order of their numbers.

    A taken checkpoint is a directory of hard links (copies across file systems) below
    ``incoming``: it stays whole when the trainer deletes the original, and the one that was
    taken when a stream was killed is still there when it resumes. Only complete checkpoints
    are taken. One that the trainer deleted before it could be taken is passed over.
    """

    folder: Path
    incoming: Path
    base_model: str
    options: WatchOptions
    say: Callable[[str], None]

    def next(self, after: int) -> tuple[int, RunCheckpoint] | str:
        """Wait for the first complete checkpoint whose number exceeds ``after``.

        Where the run has ended, returns what says so: the checkpoint ``after`` was its last,
        its end marker is there, or nothing new came within the timeout.
        """
        self.incoming.mkdir(parents=True, exist_ok=True)
        for left in self.incoming.glob(".*"):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                remove(left)
        deadline = time.monotonic() + self.options.timeout
        told = False
        while True:
            # Read before the directory is: a checkpoint that precedes the marker is seen.
            ended = self._ended(after)
            taken = self._take_first(after, ended)
            if taken is not None:
                return taken, trained_checkpoint(
                    self.incoming / f"checkpoint-{taken}", self.base_model
                )
            if ended or time.monotonic() > deadline:
                self._tell_left_out(after)
                timeout = f"no new checkpoint in {self.options.timeout:g} s"
                return "the training run has ended" if ended else timeout
            if not told:
                which = f"a checkpoint after step {after}" if after >= 0 else "the first checkpoint"
                self.say(f"waiting for {which} in {self.folder}")
                told = True
            time.sleep(self.options.poll)

    def forget(self, upto: int) -> None:
        """Remove taken checkpoints up to number ``upto``, but keep a note if one was the last."""
        for number, path in numbered_checkpoints(self.incoming).items():
            if number <= upto:
                if is_last(path):
                    (self.incoming / "last").write_text(f"{number}\n", encoding="utf-8")
                remove(path)

    def _tell_left_out(self, after: int) -> None:
        for number, path in numbered_checkpoints(self.folder).items():
            problem = missing_part(path)
            if number > after and problem:
                self.say(f"{path.name} is left out: it is not complete ({problem})")

    def _ended(self, after: int) -> bool:
        marker = self.options.end_marker
        file = Path(marker) if marker else self.folder / END_MARKER
        return file.exists() or self._last() == after

    def _last(self) -> int | None:
        try:
            return int((self.incoming / "last").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _take_first(self, after: int, ended: bool) -> int | None:
        taken = [n for n in numbered_checkpoints(self.incoming) if n > after]
        limit = min(taken, default=None)
        for number, path in numbered_checkpoints(self.folder).items():
            if number <= after or (limit is not None and number >= limit):
                continue
            if self._complete(path, ended) and take(path, self.incoming):
                return number
        return limit

    def _complete(self, path: Path, ended: bool) -> bool:
        if missing_part(path) is not None:
            return False
        if (path / TRAINER_STATE).is_file() or ended:
            return True  # the trainer writes this file last
        try:
            newest = max(file.stat().st_mtime for file in path.iterdir())
        except (OSError, ValueError):
            return False
        return time.time() - newest >= self.options.settle


def take(checkpoint: Path, incoming: Path) -> bool:
    """Link what a merge needs of ``checkpoint`` into ``incoming``; False if it vanished meanwhile.

    Complete or absent under its final name. Two processes may take the same one.

    Raises:
        Failure: ``incoming`` cannot be written.
    """
    final = incoming / checkpoint.name
    try:
        incoming.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{checkpoint.name}.", dir=incoming))
    except OSError as error:
        raise Failure(f"{incoming}: {error.strerror}; the checkpoint cannot be taken") from error
    try:
        for file in sorted(checkpoint.iterdir()):
            if file.is_file() and not file.name.startswith(_TRAINING_ONLY):
                _link(file, staging / file.name)
        # Deleting takes time; what was linked must be whole for itself.
        if missing_part(staging) is not None or not weight_files(staging):
            return False
        staging.rename(final)
    except FileNotFoundError:
        return False
    except OSError:
        if not final.is_dir():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final.is_dir()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
