"""Follow a training run: take its checkpoints as they appear, before they are rotated away."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_arm.errors import Failure
from mergekit_arm.files import remove
from mergekit_arm.models.contents import missing_part, weight_files
from mergekit_arm.outputs import remove_orphans
from mergekit_arm.streaming.layout import END_MARKER
from mergekit_arm.streaming.options import WatchOptions
from mergekit_arm.streaming.training.checkpoints import (
    TRAINER_STATE,
    RunCheckpoint,
    checkpoint_at,
    is_last,
    numbered_checkpoints,
)

OVER = "over"
"""What a training process that feeds a stream says at its end, a line on standard input."""

# What a trainer needs to go on and a merge does not.
_TRAINING_ONLY = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")

_Files = tuple[tuple[str, int, int], ...]
"""Of a directory: names, sizes and times."""


@dataclass
class Watch:
    """Takes a run's checkpoints as they appear, in a thread, and hands them out in order.

    A taken checkpoint is a directory of hard links (copies across file systems) below
    ``incoming``: it stays whole when the trainer deletes the original, however long a step
    takes, and what was taken when a stream was killed is still there when it resumes. Only
    complete checkpoints are taken. Of one that the trainer deleted before, ``say`` is told.
    """

    folder: Path
    incoming: Path
    base_model: str
    options: WatchOptions
    say: Callable[[str], None]
    after: int = -1
    """The number up to which checkpoints are done with."""
    last: int | None = None
    """The number of the run's last checkpoint, where that is known."""
    _over: threading.Event = field(default_factory=threading.Event)
    """The training process that feeds this stream has said that it ends."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _look: threading.Lock = field(default_factory=threading.Lock)
    _seen: dict[int, tuple[_Files, float]] = field(default_factory=dict)
    """How a checkpoint looked that is not taken yet, and since when, by a clock of our own."""
    _problem: Exception | None = None

    def __enter__(self) -> Watch:
        """Begin to take checkpoints."""
        self.incoming.mkdir(parents=True, exist_ok=True)
        remove_orphans(self.incoming.glob(".*"))
        work = self._listen if self.options.fed else self._take_on
        # A daemon, since it may wait for a line that never comes.
        threading.Thread(target=work, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take no more."""
        with self._look:
            self._stop.set()

    def next(self, after: int) -> RunCheckpoint | str:
        """Wait for the first complete checkpoint whose number exceeds ``after``.

        Where the run has ended, returns what says so: its last checkpoint was handed out,
        its end marker is there, the process that feeds this one has said it, or nothing new
        came within the timeout. Forgets what was taken up to ``after``.

        Raises:
            Failure: checkpoints cannot be taken.
        """
        self._forget(after)
        deadline = time.monotonic() + self.options.timeout
        told = False
        while True:
            # Read before the directory is: a checkpoint that precedes the end is seen.
            ended = self._ended()
            if not self.options.fed:
                self._take_all(ended)
            if self._problem is not None:
                raise Failure(f"{self.incoming}: {self._problem}; run again") from self._problem
            taken = [path for n, path in numbered_checkpoints(self.incoming).items() if n > after]
            if taken:
                return checkpoint_at(taken[0].name, str(taken[0]), self.base_model)
            if ended or (time.monotonic() > deadline and not self.options.fed):
                self._tell_left_out(after)
                timeout = f"no new checkpoint in {self.options.timeout:g} s"
                return "the training run has ended" if ended else timeout
            if not told:
                which = f"a checkpoint after step {after}" if after >= 0 else "the first checkpoint"
                self.say(f"waiting for {which} in {self.folder}")
                told = True
            time.sleep(self.options.poll)

    def _forget(self, upto: int) -> None:
        with self._look:
            self.after = upto
            for number, path in numbered_checkpoints(self.incoming).items():
                if number <= upto:
                    if is_last(path):
                        self.last = number
                    remove(path)

    def _take_on(self) -> None:
        while not self._stop.wait(self.options.poll):
            try:
                self._take_all(self._ended())
            except (OSError, Failure) as error:
                self._problem = error  # for the loop, which reads it before it waits
                return

    def _listen(self) -> None:
        """Read what the training process says; without it there is nothing to go on for."""
        said = b""
        # Not through a buffer, whose lock would abort an interpreter that ends meanwhile.
        while part := os.read(sys.stdin.fileno(), 64):
            said += part
            if OVER.encode() in said:
                self._over.set()
                return
        os.kill(os.getpid(), signal.SIGTERM)

    def _take_all(self, ended: bool) -> None:
        with self._look:
            if self._stop.is_set():
                return
            there, taken = numbered_checkpoints(self.folder), numbered_checkpoints(self.incoming)
            for number in sorted(self._seen.keys() - there.keys() - taken.keys()):
                del self._seen[number]
                if number > self.after:
                    self.say(f"checkpoint-{number} was deleted before it could be taken")
            for number, path in there.items():
                if number > self.after and number not in taken and self._whole(number, ended):
                    take(path, self.incoming)

    def _tell_left_out(self, after: int) -> None:
        for number, path in numbered_checkpoints(self.folder).items():
            problem = missing_part(path)
            if number > after and problem:
                self.say(f"{path.name} is left out: it is not complete ({problem})")

    def _ended(self) -> bool:
        if self.options.fed:
            return self._over.is_set()
        marker = Path(self.options.end_marker or self.folder / END_MARKER)
        return self.last is not None or marker.exists()

    def _whole(self, number: int, ended: bool) -> bool:
        """Say whether all of a checkpoint is written.

        Its weights are as long as their headers say. What else belongs to it is there if the
        trainer's state is, which is written last, or if two looks find the same. Times of files
        are compared for equality alone: their clock is not ours, and may go back.
        """
        path = self.folder / f"checkpoint-{number}"
        with suppress(OSError):  # it vanishes
            files = _files_of(path)
            before, since = self._seen.get(number, (None, 0.0))
            now = time.monotonic()
            self._seen[number] = files, since if files == before else now
            if missing_part(path) is None:
                unchanged = files == before and now - since >= self.options.poll
                return ended or unchanged or (path / TRAINER_STATE).is_file()
        return False


def take(checkpoint: Path, incoming: Path) -> bool:
    """Link what a merge needs of ``checkpoint`` into ``incoming``; False if it vanished meanwhile.

    Complete or absent under its final name. Two processes may take the same one.

    Raises:
        Failure: ``incoming`` cannot be written.
    """
    final = incoming / checkpoint.name
    try:
        incoming.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{checkpoint.name}.{os.getpid()}.", dir=incoming))
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


def _files_of(folder: Path) -> _Files:
    found = ((file.name, file.stat()) for file in folder.iterdir())
    return tuple(sorted((name, one.st_size, one.st_mtime_ns) for name, one in found))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links; or it is gone, as this finds
        shutil.copy2(source, target)
