"""Follow a run that is still going: complete checkpoints only, whatever the trainer deletes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_arm.errors import Failure, InputError
from mergekit_arm.streaming import StreamOptions, WatchOptions, stream
from mergekit_arm.streaming.training.checkpoints import is_last
from mergekit_arm.streaming.training.watch import Watch, take
from tests.support.models import perturbed, tiny_llama
from tests.support.streams import add_tokenizer, config, weights, write_tokens

FAST = WatchOptions(poll=0.02, timeout=20)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base`` and ``checkpoint-N`` for N = 1 … 4, for a trainer to put where it likes."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny_llama(0)
    base.save_pretrained(folder / "base")
    for number in (1, 2, 3, 4):
        perturbed(base, number).save_pretrained(folder / f"checkpoint-{number}")
    return folder


def save(models: Path, run: Path, number: int, *, last: bool = False) -> Path:
    """Save a checkpoint as Trainer does: weights first, its state last of all."""
    folder = run / f"checkpoint-{number}"
    shutil.copytree(models / f"checkpoint-{number}", folder)
    (folder / "optimizer.pt").write_bytes(b"much")
    state = {"global_step": number, "max_steps": number if last else 99}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def digest(model: Path) -> str:
    return hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()


def watch(models: Path, tmp_path: Path, options: WatchOptions = FAST) -> Watch:
    return Watch(
        tmp_path / "run", tmp_path / "in", str(models / "base"), options, lambda note: None
    )


def test_a_checkpoint_is_taken_when_it_is_complete(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoint-1"
    follower = watch(models, tmp_path, WatchOptions(poll=0.05, timeout=0.2))
    folder.mkdir(parents=True)
    # Half the weights, long enough; the state, which has the last word; then all weights.
    shutil.copy(models / "checkpoint-1" / "config.json", folder)
    content = (models / "checkpoint-1" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert follower.next(-1) == "no new checkpoint in 0.2 s"
    (folder / "trainer_state.json").write_text("{}")
    assert follower.next(-1) == "no new checkpoint in 0.2 s"
    (folder / "model.safetensors").write_bytes(content)
    taken = follower.next(-1)
    assert not isinstance(taken, str)
    assert taken.name == "checkpoint-1"
    assert taken.reference == str(tmp_path / "in" / "checkpoint-1")


@pytest.mark.parametrize("away", [-9e8, 0, 9e8], ids=["slow", "right", "fast"])
def test_without_a_trainers_state_two_looks_must_find_the_same(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: float
) -> None:
    """Whatever our clock says, and whatever that of the disk said when it was written."""
    notes = tmp_path / "run" / "checkpoint-1" / "notes.txt"
    shutil.copytree(models / "checkpoint-1", notes.parent)
    sizes, clock, sleep = [1, 2, 3, 4, 4, 4], iter(range(10**6, 0, -10)), time.sleep

    def between(seconds: float) -> None:
        sleep(seconds)
        notes.write_text("x" * (sizes.pop(0) if len(sizes) > 1 else sizes[0]))
        os.utime(notes, (1e9 + away, 1e9 + away))

    between(0)  # a trainer that writes its files one after another
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "sleep", between)
    taken = watch(models, tmp_path, WatchOptions(poll=0.02, timeout=60)).next(-1)
    assert not isinstance(taken, str)
    assert (Path(taken.reference) / "notes.txt").read_text() == "xxxx"


def test_what_a_dead_process_took_half_way_is_removed(models: Path, tmp_path: Path) -> None:
    dead, alive = 2**22 + 1, os.getppid()
    for process in (dead, alive, os.getpid()):
        (tmp_path / "in" / f".checkpoint-1.{process}.abcdefgh").mkdir(parents=True)
    (tmp_path / "in" / ".removed.abcdefgh" / "checkpoint-1").mkdir(parents=True)
    with watch(models, tmp_path):
        pass
    assert [one.name for one in (tmp_path / "in").iterdir()] == [f".checkpoint-1.{alive}.abcdefgh"]


def test_what_was_taken_outlives_its_original(models: Path, tmp_path: Path) -> None:
    folder = save(models, tmp_path / "run", 1)
    original = digest(folder)
    taken = watch(models, tmp_path).next(-1)
    assert not isinstance(taken, str)
    shutil.rmtree(folder)
    copy = tmp_path / "in" / "checkpoint-1"
    assert digest(copy) == original
    assert not (copy / "optimizer.pt").exists()


def test_a_checkpoint_that_vanishes_half_way_is_passed_over(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (save(models, tmp_path / "run", n) for n in (1, 2))
    link = os.link

    def rotating(source: Path, target: Path) -> None:
        if source.parent == first and source.name == "model.safetensors":
            shutil.rmtree(first)
        link(source, target)

    monkeypatch.setattr(os, "link", rotating)
    taken = watch(models, tmp_path).next(-1)
    assert not isinstance(taken, str)
    assert taken.name == "checkpoint-2"
    assert [path.name for path in (tmp_path / "in").iterdir()] == [second.name]


def test_two_may_take_the_same_checkpoint(models: Path, tmp_path: Path) -> None:
    folder = save(models, tmp_path / "run", 1)
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(take(folder, tmp_path / "in")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 8
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["checkpoint-1"]


def test_the_last_step_of_training_is_known(models: Path, tmp_path: Path) -> None:
    assert not is_last(save(models, tmp_path, 1))
    assert is_last(save(models, tmp_path, 2, last=True))
    assert not is_last(models / "checkpoint-1")


def trainer(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("ending", ["last step", "marker", "timeout"])
def test_a_stream_follows_training_to_its_end(models: Path, tmp_path: Path, ending: str) -> None:
    run = tmp_path / "run"

    def train() -> None:
        for number in (1, 2, 3):
            time.sleep(0.1)
            save(models, run, number, last=ending == "last step" and number == 3)
        if ending == "marker":
            (run / "stream.end").touch()

    thread = trainer(train)
    options = WatchOptions(poll=0.02, timeout=3 if ending == "timeout" else 60)
    document = config(tmp_path, base_model=str(models / "base"))
    result = stream(document, tmp_path / "out", StreamOptions(watch=options))
    thread.join()
    ended = "no new checkpoint in 3 s" if ending == "timeout" else "the training run has ended"
    assert result.stopped == ended
    assert [record.checkpoint for record in result.steps] == [f"checkpoint-{n}" for n in (1, 2, 3)]
    expected = weights(models / "base")
    for number in (1, 2, 3):
        incoming = weights(models / f"checkpoint-{number}")
        expected = {name: w + 0.5 * (incoming[name] - w) for name, w in expected.items()}
    found = weights(result.model)
    assert all(torch.allclose(found[n], expected[n], rtol=1e-5, atol=1e-7) for n in found)
    assert not (tmp_path / "out" / "incoming").exists()


def test_what_is_rotated_away_during_a_long_step_is_merged(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mergekit_arm.streaming.step.step as module

    run = tmp_path / "run"
    merge = module.merge

    def slow(document: Any, text: str, *rest: Any) -> None:
        if "checkpoint-1" in text:  # a trainer that keeps one checkpoint saves three more
            for number in (2, 3, 4):
                folder = save(models, run, number, last=number == 4)
                time.sleep(0.5)
                shutil.rmtree(folder)
        merge(document, text, *rest)

    monkeypatch.setattr(module, "merge", slow)
    save(models, run, 1)
    document = config(tmp_path, base_model=str(models / "base"))
    result = stream(document, tmp_path / "out", StreamOptions(watch=FAST))
    assert [one.checkpoint for one in result.steps] == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
    assert not (tmp_path / "out" / "incoming").exists()


def test_what_vanishes_before_it_is_whole_is_told(models: Path, tmp_path: Path) -> None:
    folder = save(models, tmp_path / "run", 1)
    (folder / "config.json").unlink()
    notes: list[str] = []
    options = WatchOptions(poll=0.02, timeout=0.5)
    with Watch(tmp_path / "run", tmp_path / "in", "base", options, notes.append) as follower:
        time.sleep(0.2)
        shutil.rmtree(folder)
        assert follower.next(-1) == "no new checkpoint in 0.5 s"
    assert "checkpoint-1 was deleted before it could be taken" in notes


def test_a_watched_stream_goes_on_with_further_training(models: Path, tmp_path: Path) -> None:
    save(models, tmp_path / "run", 1, last=True)
    document = config(tmp_path, base_model=str(models / "base"))
    stream(document, tmp_path / "out", StreamOptions(watch=FAST))
    again = stream(document, tmp_path / "out", StreamOptions(watch=FAST))  # ended, it waits not
    assert len(again.steps) == 1
    save(models, tmp_path / "run", 2, last=True)
    assert len(stream(document, tmp_path / "out", StreamOptions(watch=FAST)).steps) == 2
    save(models, tmp_path / "run", 3)
    assert len(stream(document, tmp_path / "out").steps) == 3  # and without --watch as well


def interrupted(document: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch until the merge of checkpoint-2, which is not made."""
    import mergekit_arm.streaming.step.step as module

    merge = module.merge

    def dying(document: Any, text: str, *rest: Any) -> None:
        if "checkpoint-2" in text:
            raise KeyboardInterrupt
        merge(document, text, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "merge", dying)
        with pytest.raises(KeyboardInterrupt):
            stream(document, out, StreamOptions(watch=FAST))


def test_a_watch_resumes_with_the_checkpoint_it_had_taken(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    for number in (1, 2):
        save(models, run, number)
    document = config(tmp_path, base_model=str(models / "base"))
    interrupted(document, out, monkeypatch)
    shutil.rmtree(run / "checkpoint-1")  # rotated away while nobody looked
    shutil.rmtree(run / "checkpoint-2")
    save(models, run, 3, last=True)
    result = stream(document, out, StreamOptions(watch=FAST))
    assert [record.checkpoint for record in result.steps] == [f"checkpoint-{n}" for n in (1, 2, 3)]


def test_a_watch_resumes_with_a_checkpoints_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(0)
    base.resize_token_embeddings(320)
    base.save_pretrained(tmp_path / "base")
    add_tokenizer(tmp_path / "base")
    for number in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{number}"
        perturbed(base, number).save_pretrained(folder)
        add_tokenizer(folder, template="{% for m in messages %}{{ m.content }}{% endfor %}")
        state = {"global_step": number, "max_steps": 2}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    document = config(tmp_path, evaluation={"dataset": str(tmp_path / "chats.jsonl")})
    interrupted(document, tmp_path / "out", monkeypatch)
    assert len(stream(document, tmp_path / "out", StreamOptions(watch=FAST)).steps) == 2


def test_a_list_of_rates_ends_a_watch(models: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        save(models, tmp_path / "run", number)
    document = config(tmp_path, base_model=str(models / "base"), learning_rate=[0.5, 0.4])
    result = stream(document, tmp_path / "out", StreamOptions(watch=FAST))
    assert [record.learning_rate for record in result.steps] == [0.5, 0.4]
    assert result.stopped == "the list of learning rates is used up"


def test_a_run_without_a_checkpoint_fails_and_may_be_followed_again(
    models: Path, tmp_path: Path
) -> None:
    save(models, tmp_path / "run", 1, last=True)
    weights_file = tmp_path / "run" / "checkpoint-1" / "model.safetensors"
    content = weights_file.read_bytes()
    weights_file.write_bytes(content[:-1])
    evaluation = {"dataset": str(write_tokens(tmp_path / "heldout.jsonl", 8))}
    document = config(tmp_path, base_model=str(models / "base"), evaluation=evaluation)
    hasty = StreamOptions(watch=WatchOptions(poll=0.02, timeout=0.1))
    notes: list[str] = []
    with pytest.raises(Failure, match="no checkpoint was merged"):
        stream(document, tmp_path / "out", hasty, say=notes.append)
    assert any("checkpoint-1 is left out" in note and "truncated" in note for note in notes)
    assert not (tmp_path / "out" / "model").exists()
    weights_file.write_bytes(content)
    assert len(stream(document, tmp_path / "out", hasty).steps) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"passes": 2}, "passes: --watch goes through the checkpoints once"),
        ({"checkpoints": ["a"]}, "--watch follows one Trainer output directory"),
        ({"checkpoints": __file__}, "is a file; --watch follows"),
        ({"learning_rate": {"schedule": "cosine", "peak": 0.5}}, "add steps: N"),
    ],
)
def test_what_a_watch_cannot_do_is_refused(
    models: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    document = config(tmp_path, base_model=str(models / "base"), **changes)
    with pytest.raises(InputError) as caught:
        stream(document, tmp_path / "out", StreamOptions(watch=FAST))
    assert said in caught.value.message
