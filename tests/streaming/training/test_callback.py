"""A stream that a ``Trainer`` feeds while it trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from transformers import LlamaForCausalLM

from mergekit_arm.cli.main import main
from mergekit_arm.errors import Failure, InputError
from mergekit_arm.streaming import StreamCallback, stream
from mergekit_arm.streaming.training import callback as callback_module
from mergekit_arm.streaming.training.watch import take
from tests.support import forks
from tests.support.models import tiny_llama
from tests.support.ranks import free_port
from tests.support.streams import config, weights, write_run, write_tokens


@pytest.fixture(autouse=True)
def base(tmp_path: Path) -> None:
    """Save what every stream here starts from: it is looked at before training begins."""
    tiny_llama(0).save_pretrained(tmp_path / "base")


def test_a_plan_is_checked_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="linear"):
        StreamCallback(config(tmp_path, merge_method="linear"), tmp_path / "out")
    endless = {"schedule": "cosine", "peak": 1.0}
    with pytest.raises(InputError, match="steps"):
        StreamCallback(config(tmp_path, learning_rate=endless), tmp_path / "out")


@pytest.mark.slow
def test_a_trainer_feeds_a_stream(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    base = tiny_llama(0)
    base.save_pretrained(tmp_path / "base")
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(96, (16, 12))]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=6,
        save_steps=2,
        save_total_limit=1,  # every checkpoint but the newest is deleted at once
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    document = config(tmp_path, checkpoints=None)
    callback = StreamCallback(document, tmp_path / "out", ["--poll", "0.1", "--quiet"])
    Trainer(model=base, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    final = callback.check()
    records = (tmp_path / "out" / "stream.jsonl").read_text().splitlines()
    assert [json.loads(line)["checkpoint"] for line in records] == [
        "checkpoint-2", "checkpoint-4", "checkpoint-6",
    ]  # fmt: skip
    before, after = weights(tmp_path / "base"), weights(final)
    assert any(not torch.equal(before[name], after[name]) for name in before)


class State:
    is_world_process_zero = True
    global_step = 2


class Child:
    """A stream that is over before it began."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self.stdin = None

    def poll(self) -> int:
        return 0

    def wait(self, timeout: float) -> int:
        return 0


def test_a_failing_stream_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(Child):
        def poll(self) -> int:
            return 2

        def wait(self, timeout: float) -> int:
            return 2

    monkeypatch.setattr(callback_module.subprocess, "Popen", Refusing)
    callback = StreamCallback(config(tmp_path), tmp_path / "out")

    class Arguments:
        output_dir = str(tmp_path / "run")

    callback.on_train_begin(Arguments(), State(), None)  # type: ignore[arg-type]
    callback.on_train_end(Arguments(), State(), None)  # type: ignore[arg-type]
    with pytest.raises(Failure, match="ended with 2"):
        callback.check()


def test_a_checkpoint_that_cannot_be_taken_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    children: list[subprocess.Popen[bytes]] = []

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        children.append(Popen(sleeping, **options))
        return children[-1]

    Popen = subprocess.Popen
    monkeypatch.setattr(callback_module.subprocess, "Popen", popen)
    callback = StreamCallback(config(tmp_path), tmp_path / "out")

    class Arguments:
        output_dir = str(tmp_path / "run")

    callback.on_train_begin(Arguments(), State(), None)  # type: ignore[arg-type]
    callback.on_train_begin(Arguments(), State(), None)  # type: ignore[arg-type]
    assert len(children) == 1  # after an interruption the stream that waits is used again
    tiny_llama(0).save_pretrained(tmp_path / "run" / "checkpoint-2")
    (tmp_path / "out").write_text("in the way")
    callback.on_save(Arguments(), State(), None)  # type: ignore[arg-type]
    assert "checkpoint-2 cannot be streamed" in caplog.text
    children[0].kill()
    assert children[0].wait(timeout=20) == -signal.SIGKILL


def begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, run: str = "run"
) -> StreamCallback:
    """Begin a training at ``step`` into ``run``, with a stream into ``out`` that does nothing."""
    monkeypatch.setattr(callback_module.subprocess, "Popen", Child)

    class Arguments:
        output_dir = str(tmp_path / run)

    class At(State):
        global_step = step

    callback = StreamCallback(config(tmp_path, checkpoints=None), tmp_path / "out")
    callback.on_train_begin(Arguments(), At(), None)  # type: ignore[arg-type]
    return callback


def test_another_trainings_stream_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished stream's model would be returned as this training's."""
    write_run(tmp_path, (2, 4))
    stream(config(tmp_path), tmp_path / "out")
    for step in (0, 2):
        with pytest.raises(InputError, match=r"came to checkpoint-4.*another training's"):
            begin(tmp_path, monkeypatch, step, "another")
    begin(tmp_path, monkeypatch, 4)  # the same, resumed


@pytest.mark.slow
def test_the_stream_of_another_directory_is_refused_by_the_stream(tmp_path: Path) -> None:
    """Where a training was resumed, and its numbers alone would fit."""
    write_run(tmp_path, (2,))
    stream(config(tmp_path), tmp_path / "out")

    class Arguments:
        output_dir = str(tmp_path / "another")

    callback = StreamCallback(config(tmp_path, checkpoints=None), tmp_path / "out", ["--quiet"])
    callback.on_train_begin(Arguments(), State(), None)  # type: ignore[arg-type]
    callback.on_train_end(Arguments(), State(), None)  # type: ignore[arg-type]
    with pytest.raises(Failure, match="ended with 2"):
        callback.check()


def test_only_this_trainings_checkpoints_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, (2, 4, 6))
    taken = tmp_path / "out" / "incoming"
    begin(tmp_path, monkeypatch, 0)
    assert not taken.exists()  # all three are an older run's
    begin(tmp_path, monkeypatch, 4)  # resumed from the second
    assert sorted(path.name for path in taken.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    begin(tmp_path, monkeypatch, 2)
    assert [path.name for path in taken.iterdir()] == ["checkpoint-2"]


def test_a_stream_that_still_runs_is_not_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callback_module, "ORPHAN", 0.1)
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(InputError, match="another process"):
        begin(tmp_path, monkeypatch, 0)


def fed(pipe: Path) -> None:
    """Stream ``stream.yml`` as a training's stream, whose standard input is ``pipe``."""
    os.dup2(os.open(pipe, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.argv = ["mergekit-arm", "stream", "stream.yml", "out", "--watch", "--fed", "--poll", "0.1"]
    main()


@pytest.mark.slow
def test_a_stream_ends_with_the_training_that_feeds_it(tmp_path: Path) -> None:
    """Also where that is killed, and nothing of it can say so."""
    write_run(tmp_path, (2,))
    (tmp_path / "stream.yml").write_text(yaml.safe_dump(config(tmp_path)))
    os.mkfifo(tmp_path / "pipe")
    child = forks.Running(fed, tmp_path / "pipe", cwd=tmp_path, environment={"COLUMNS": "300"})
    with (tmp_path / "pipe").open("w"):
        # It takes nothing itself: what lies there may be another training's.
        until = time.monotonic() + forks.LIMIT
        while "waiting for the first checkpoint" not in child.said():
            assert child.alive(), child.said()
            assert time.monotonic() < until
            time.sleep(0.05)
    assert child.end().returncode == -signal.SIGTERM
    # One that has an end of its own does not wait to be told.
    document = config(tmp_path, learning_rate=[0.5])
    (tmp_path / "stream.yml").write_text(yaml.safe_dump(document))
    take(tmp_path / "run" / "checkpoint-2", tmp_path / "out" / "incoming")
    child = forks.Running(fed, tmp_path / "pipe", cwd=tmp_path)
    with (tmp_path / "pipe").open("w"):
        assert child.end().returncode == 0


def training(folder: Path) -> None:
    """What each process of a training does; a file for each says what it learnt in the end."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": [i, 1, 2, 3], "labels": [i, 1, 2, 3]} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    document = {
        "merge_method": "aim",
        "base_model": str(folder / "base"),
        "calibration": {"dataset": str(folder / "tokens.jsonl"), "device": "cpu"},
    }
    callback = StreamCallback(document, folder / "out", ["--poll", "0.1", "--quiet"])
    model = LlamaForCausalLM.from_pretrained(folder / "base")
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()  # type: ignore[arg-type]
    (folder / f"model-of-{arguments.process_index}").write_text(str(callback.check()))


@pytest.mark.slow
def test_every_process_of_a_training_learns_how_the_stream_ended(tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path / "base")
    write_tokens(tmp_path / "tokens.jsonl", 6)
    # As torchrun sets them. With these variables the stream's calibration would wait for ever for
    # other processes.
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    started = [
        forks.Running(training, tmp_path, environment={**job, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    for process, one in enumerate(started):
        ended = one.end()
        assert ended.returncode == 0, ended.stderr
        said = (tmp_path / f"model-of-{process}").read_text()
        assert said == f"{tmp_path}/out/model"
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_the_stream_is_none_of_the_trainings_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []

    class Recorder(Child):
        def __init__(self, command: list[str], env: dict[str, str], **options: Any) -> None:
            super().__init__(command)
            given.append(env)

    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    launched |= {"MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", "/kept")
    monkeypatch.setattr(callback_module.subprocess, "Popen", Recorder)

    class Arguments:
        output_dir = str(tmp_path / "run")

    callback = StreamCallback(config(tmp_path), tmp_path / "out")
    callback.on_train_begin(Arguments(), State(), None)  # type: ignore[arg-type]
    assert not launched.keys() & given[0].keys()
    assert given[0]["HF_HOME"] == "/kept"


def test_a_wrong_configuration_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'merge_method'"):
        StreamCallback({"merge_metod": "arm", "base_model": "x"}, tmp_path / "out")
