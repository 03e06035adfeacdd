"""Merge while training goes on: a callback for transformers' ``Trainer``."""

from __future__ import annotations

import atexit
import logging
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mergekit_arm.errors import Failure
from mergekit_arm.streaming.config import StreamConfig, load_config, plain_path
from mergekit_arm.streaming.layout import END_MARKER, INCOMING
from mergekit_arm.streaming.training.watch import take

LOG = logging.getLogger(__name__)


class StreamCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Feeds every checkpoint that a ``Trainer`` saves to a stream, as it is saved.

    The stream is a process of its own, ``mergekit-arm stream … --watch``: training keeps its
    random numbers, its memory and its speed, as far as the machine has room for both. Where
    they share an accelerator, say ``device: cpu`` under calibration and evaluation, or see
    that both fit. Every checkpoint is taken at the moment it is saved, before the trainer can
    rotate it away; those that wait for a slower stream stay on the disk until it has come to
    them::

        callback = StreamCallback("stream.yml", "./merged")
        Trainer(..., callbacks=[callback]).train()      # waits for the stream at its end
        model = callback.check()                        # its directory; raises if it failed

    A stream that fails does not end the training: it is logged, and :meth:`check` raises. A
    training that fails ends the stream; the same training, resumed, goes on with it.
    """

    def __init__(
        self,
        config: StreamConfig | Mapping[str, Any] | str | Path,
        out: str | Path,
        arguments: Sequence[str] = (),
        *,
        wait: bool = True,
    ) -> None:
        """Check the configuration now, before training costs anything.

        Args:
            config: the stream's; ``checkpoints`` may be missing, it is the trainer's output.
            out: the stream's directory.
            arguments: further options of ``mergekit-arm stream``, such as ``["--cuda"]``.
            wait: whether the end of training waits for the stream's.

        Raises:
            InputError: the configuration is wrong.
        """
        self._document = _document(config)
        load_config({"checkpoints": "unknown yet", **self._document})
        self.out = Path(plain_path(out))
        self._arguments = list(arguments)
        self._wait = wait
        self._scratch = tempfile.TemporaryDirectory(prefix="mergekit-arm-stream-")
        self._child: subprocess.Popen[bytes] | None = None
        self._failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the stream, on the main process."""
        if not state.is_world_process_zero:
            return
        run = Path(args.output_dir)
        run.mkdir(parents=True, exist_ok=True)
        (run / END_MARKER).unlink(missing_ok=True)  # of an earlier training
        if self._child is not None and self._child.poll() is None:
            return  # of a training that was interrupted in this process
        file = Path(self._scratch.name) / "stream.yml"
        document = {**self._document, "checkpoints": str(run.absolute())}
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        command = [sys.executable, "-m", "mergekit_arm", "stream", str(file), str(self.out)]
        self._child = subprocess.Popen([*command, "--watch", *self._arguments])
        # A training that fails would leave it waiting, and the next one's stream locked out.
        atexit.register(self._child.terminate)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the checkpoint that was just saved."""
        if self._child is None or self._ended():
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        problem = "it is not a complete model"
        try:
            taken = take(checkpoint, self.out / INCOMING)
        except (OSError, Failure) as error:  # a full disk, or a stream that just now finished
            taken, problem = False, str(error)
        if not taken:
            LOG.error("%s cannot be streamed: %s", checkpoint, problem)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell the stream that no more checkpoints come, and wait for its end."""
        if self._child is None:
            return
        atexit.unregister(self._child.terminate)
        (Path(args.output_dir) / END_MARKER).touch()
        if self._wait:
            self._child.wait()
            self._ended()

    def check(self) -> Path:
        """Wait for the stream and return its final model's directory.

        Raises:
            Failure: it ended without one.
        """
        if self._child is None or self._child.wait() != 0:
            status = "never began" if self._child is None else f"ended with {self._child.poll()}"
            raise Failure(f"{self.out}: the stream {status}; its own output says why")
        return self.out / "model"

    def _ended(self) -> bool:
        """Say whether the stream is over, and log it once if it failed."""
        assert self._child is not None
        status = self._child.poll()
        if status not in (None, 0) and not self._failed:
            self._failed = True
            LOG.error("the stream in %s ended with status %s; training goes on", self.out, status)
        return status is not None


def _document(config: StreamConfig | Mapping[str, Any] | str | Path) -> dict[str, Any]:
    if isinstance(config, StreamConfig):
        return config.document()
    if isinstance(config, Mapping):
        return dict(config)
    loaded = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    if not isinstance(loaded, dict):
        load_config(config)  # refuses it in one line
    return dict(loaded)
