"""A stream that a ``Trainer`` feeds while it trains."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergekit_arm.errors import Failure, InputError
from mergekit_arm.streaming import StreamCallback
from mergekit_arm.streaming.training import callback as callback_module
from tests.support.models import tiny_llama
from tests.support.streams import config, weights, write_tokens


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


def test_a_failing_stream_does_not_end_training(tmp_path: Path) -> None:
    callback = StreamCallback({**config(tmp_path), "base_model": "./nowhere"}, tmp_path / "out")

    class Arguments:
        output_dir = str(tmp_path / "run")

    callback.on_train_begin(Arguments(), State(), None)  # type: ignore[arg-type]
    callback.on_train_end(Arguments(), State(), None)  # type: ignore[arg-type]
    with pytest.raises(Failure, match="ended with 2"):
        callback.check()


def test_neither_training_nor_stream_outlives_the_others_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    children: list[subprocess.Popen[bytes]] = []
    at_exit: list[Callable[[], None]] = []

    def popen(command: list[str], env: dict[str, str]) -> subprocess.Popen[bytes]:
        children.append(Popen(sleeping))
        return children[-1]

    Popen = subprocess.Popen
    monkeypatch.setattr(callback_module.subprocess, "Popen", popen)
    monkeypatch.setattr(callback_module.atexit, "register", at_exit.append)
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
    at_exit[0]()
    assert children[0].wait(timeout=20) == -signal.SIGTERM


_TRAINING = """
import sys
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from mergekit_arm.streaming import StreamCallback

folder = sys.argv[1]
rows = Dataset.from_list([{"input_ids": [i, 1, 2, 3], "labels": [i, 1, 2, 3]} for i in range(16)])
arguments = TrainingArguments(
    output_dir=f"{folder}/run", max_steps=2, save_steps=1, per_device_train_batch_size=2,
    report_to=[], use_cpu=True, disable_tqdm=True,
)
document = {
    "merge_method": "aim",
    "base_model": f"{folder}/base",
    "calibration": {"dataset": f"{folder}/tokens.jsonl", "device": "cpu"},
}
callback = StreamCallback(document, f"{folder}/out", ["--poll", "0.1", "--quiet"])
model = LlamaForCausalLM.from_pretrained(f"{folder}/base")
Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
# A file for each process: what they print would mix.
with open(f"{folder}/model-of-{arguments.process_index}", "w") as said:
    said.write(str(callback.check()))
"""


@pytest.mark.slow
def test_every_process_of_a_training_learns_how_the_stream_ended(tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path / "base")
    write_tokens(tmp_path / "tokens.jsonl", 6)
    (tmp_path / "training.py").write_text(_TRAINING)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    # With torchrun's variables the stream's calibration would wait for ever for other processes.
    done = subprocess.run(
        [*launcher, "--standalone", tmp_path / "training.py", tmp_path],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for process in (0, 1):
        said = (tmp_path / f"model-of-{process}").read_text()
        assert said == f"{tmp_path}/out/model"
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


def test_the_stream_is_none_of_the_trainings_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []

    class Child:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            given.append(env)

        def terminate(self) -> None:
            pass

    launched = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    launched |= {"MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HF_HOME", "/kept")
    monkeypatch.setattr(callback_module.subprocess, "Popen", Child)

    class Arguments:
        output_dir = str(tmp_path / "run")

    callback = StreamCallback(config(tmp_path), tmp_path / "out")
    callback.on_train_begin(Arguments(), State(), None)  # type: ignore[arg-type]
    assert not launched.keys() & given[0].keys()
    assert given[0]["HF_HOME"] == "/kept"


def test_a_wrong_configuration_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'merge_method'"):
        StreamCallback({"merge_metod": "arm", "base_model": "x"}, tmp_path / "out")
