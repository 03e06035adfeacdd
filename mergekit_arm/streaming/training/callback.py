"""Merge while training goes on: a callback for transformers' ``Trainer``.

Of a training in many processes the first starts the stream and takes the checkpoints, and tells
the others how it ended.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from mergekit.options import MergeOptions
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mergekit_arm.errors import Failure, InputError
from mergekit_arm.files import remove
from mergekit_arm.models.references import plain_path
from mergekit_arm.outputs import alone
from mergekit_arm.streaming.config import StreamConfig, load_config
from mergekit_arm.streaming.layout import INCOMING, LOCK_FILE, MODEL
from mergekit_arm.streaming.plan.plan import make_plan
from mergekit_arm.streaming.state import read_state
from mergekit_arm.streaming.training.checkpoints import numbered_checkpoints, reached
from mergekit_arm.streaming.training.watch import OVER, take

LOG = logging.getLogger(__name__)

ORPHAN = 20.0
"""Seconds in which the stream of a training that was killed has noticed that."""

_MEETING = 5.0  # seconds between two meetings of processes that wait for the stream

# What torchrun tells a process of the others. The stream is none of them: with these it would
# wait for the training's processes to join its calibration.
_OF_A_RANK = re.compile(
    "((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*)"
)


class StreamCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Feeds every checkpoint that a ``Trainer`` saves to a stream, as it is saved::

        callback = StreamCallback("stream.yml", "./merged")
        Trainer(..., callbacks=[callback]).train()      # waits for the stream at its end
        model = callback.check()                        # its directory; raises if it failed

    The stream is a process of its own, ``mergekit-arm stream … --watch``: training keeps its
    random numbers, its memory and its speed, as far as the machine has room for both. Where
    they share an accelerator, say ``device: cpu`` under calibration and evaluation, or see
    that both fit. Checkpoints that wait for a slower stream stay on the disk until it has come
    to them, whatever the trainer rotates away.

    It streams the checkpoints of this training only: those that it saves and, where it is
    resumed, those that it had saved before. A stream that fails does not end the training: it is
    logged, and :meth:`check` raises. A training that fails or is killed ends the stream; the same
    training, resumed, goes on with it. Under ``torchrun`` there is one stream, and :meth:`check`
    answers on every process.
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
        self._config = load_config(config, checkpoints="not known yet")
        _, problems = make_plan(self._config, MergeOptions(), watched=True)
        if problems:
            raise InputError(problems[0])
        self.out = Path(plain_path(out))
        self._arguments = list(arguments)
        self._wait = wait
        self._scratch = tempfile.TemporaryDirectory(prefix="mergekit-arm-stream-")
        self._child: subprocess.Popen[bytes] | None = None
        self._began = False
        self._status: int | None = None
        """With which the stream ended, once that is known to every process."""
        self._failed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the stream, on the main process.

        Raises:
            InputError: ``out`` holds the stream of another training, or one that still runs.
        """
        self._began, self._status = True, None
        if not state.is_world_process_zero:
            return
        if self._child is not None and self._child.poll() is None:
            return  # of a training that was interrupted in this process
        run = Path(args.output_dir).absolute()
        self._check_out(state.global_step)
        for number, path in numbered_checkpoints(self.out / INCOMING).items():
            if number > state.global_step:  # another training's: this one has not made it yet
                remove(path)
        file = Path(self._scratch.name) / "stream.yml"
        document = {**self._config.document(), "checkpoints": str(run)}
        file.write_text(yaml.safe_dump(document), encoding="utf-8")
        command = [sys.executable, "-m", "mergekit_arm", "stream", str(file), str(self.out)]
        # It ends when this pipe does, by whatever signal this process dies.
        self._child = subprocess.Popen(
            [*command, "--watch", "--fed", *self._arguments],
            env={k: value for k, value in os.environ.items() if not _OF_A_RANK.fullmatch(k)},
            stdin=subprocess.PIPE,
        )
        merged = reached(read_state(self.out))
        for number, path in numbered_checkpoints(run).items():
            if merged < number <= state.global_step:
                self._take(path)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take the checkpoint that was just saved."""
        if self._child is not None and not self._ended():
            self._take(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Tell the stream that no more checkpoints come, and wait for its end."""
        if self._child is not None and self._child.stdin is not None:
            with suppress(OSError):  # it is over already
                self._child.stdin.write(f"{OVER}\n".encode())
                self._child.stdin.close()
        if self._wait:
            self._exit_status()
            self._ended()

    def _take(self, checkpoint: Path) -> None:
        problem = "it is not a complete model"
        try:
            taken = take(checkpoint, self.out / INCOMING)
        except (OSError, Failure) as error:  # a full disk, or a stream that just now finished
            taken, problem = False, str(error)
        if not taken:
            LOG.error("%s cannot be streamed: %s", checkpoint, problem)

    def _check_out(self, global_step: int) -> None:
        """Refuse a stream to which this training's checkpoints cannot be appended."""
        merged = reached(read_state(self.out))
        if merged > global_step:
            raise InputError(
                f"{self.out} holds a stream that came to checkpoint-{merged}, and this training "
                f"begins at step {global_step}: it is another training's; give another OUT"
            )
        busy = f"{self.out}: another process runs this stream; end it, or wait for it"
        with alone(self.out / LOCK_FILE, busy, wait=ORPHAN):
            pass

    def check(self) -> Path:
        """Wait for the stream and return its final model's directory.

        With ``wait=False``, all processes of a training must call this: they wait together.

        Raises:
            Failure: it ended without one.
        """
        if not self._began:
            raise Failure(f"{self.out}: the stream never began; train with this callback first")
        status = self._exit_status()
        if status != 0:
            raise Failure(f"{self.out}: the stream ended with {status}; its own output says why")
        return self.out / MODEL

    def _exit_status(self) -> int:
        """Return the stream's exit status once it is over, on every process.

        They meet again and again: in one long wait, a collective operation would time out.
        """
        many = dist.is_available() and dist.is_initialized()
        if self._child is None and not many:
            raise Failure(f"{self.out}: only the training's first process knows its stream's end")
        while self._status is None:
            told: list[int | None] = [None]
            if self._child is not None:
                with suppress(subprocess.TimeoutExpired):
                    told[0] = self._child.wait(_MEETING)
            if many:
                dist.broadcast_object_list(told, src=0)
            self._status = told[0]
        return self._status

    def _ended(self) -> bool:
        """Say whether the stream is over, and log it once if it failed."""
        if self._child is None:
            return False
        status = self._child.poll()
        if status not in (None, 0) and not self._failed:
            self._failed = True
            LOG.error("the stream in %s ended with status %s; training goes on", self.out, status)
        return status is not None
