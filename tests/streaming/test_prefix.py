"""A stream is a prefix: it goes on with what has come since, and past what cannot be merged."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_arm.errors import Failure, InputError
from mergekit_arm.models.contents import shortened
from mergekit_arm.streaming import StreamOptions, StreamResult, stream
from mergekit_arm.streaming.config import load_config
from mergekit_arm.streaming.forecast import forecast_stream
from mergekit_arm.streaming.step import step as step_module
from tests.support.models import perturbed, tiny_llama
from tests.support.streams import config, digest, weights, write_run, write_tokens


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``run/checkpoint-N`` for N = 1 … 4, and held-out data."""
    folder = tmp_path_factory.mktemp("models")
    write_run(folder, (1, 2, 3, 4))
    write_tokens(folder / "heldout.jsonl", 7, rows=2)
    write_tokens(folder / "other.jsonl", 8, rows=2)
    return folder


def scene(models: Path, folder: Path, numbers: tuple[int, ...]) -> Path:
    """Copy the base and the checkpoints of these numbers."""
    shutil.copytree(models / "base", folder / "base")
    for number in numbers:
        add(models, folder, number)
    return folder


def add(models: Path, folder: Path, number: int) -> Path:
    name = f"run/checkpoint-{number}"
    return Path(shutil.copytree(models / name, folder / name))


def judged(models: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    evaluation = {"dataset": str(models / "heldout.jsonl"), **changes}
    return config(folder, evaluation=evaluation)


def names(result: StreamResult) -> list[str]:
    return [record.checkpoint.removeprefix("checkpoint-") for record in result.steps]


def same_model(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in first | second)


@pytest.mark.parametrize("keep", ["last", "all"])
def test_appended_checkpoints_end_as_if_they_had_been_there(
    models: Path, tmp_path: Path, keep: Any
) -> None:
    folder = scene(models, tmp_path, (1, 2))
    calibration = {"dataset": str(models / "tokens.jsonl")}
    document = {**judged(models, folder), "merge_method": "arm", "calibration": calibration}
    first = stream(document, tmp_path / "out", StreamOptions(keep=keep))
    assert names(first) == ["1", "2"]
    add(models, folder, 3)
    shutil.rmtree(folder / "run" / "checkpoint-1")  # merged, and rotated away
    again = stream(document, tmp_path / "out", StreamOptions(keep=keep))
    assert names(again) == ["1", "2", "3"]
    add(models, folder, 1)
    whole = stream(document, tmp_path / "whole", StreamOptions(keep=keep))
    assert same_model(again.model, whole.model)
    assert again.chosen == whole.chosen


def test_nothing_new_changes_nothing(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2))
    first = stream(judged(models, folder), tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    notes: list[str] = []
    assert stream(judged(models, folder), tmp_path / "out", say=notes.append) == first
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert after == before
    assert not notes


def test_the_same_rates_in_another_form_are_the_same_stream(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1,))
    stream(config(folder), tmp_path / "out")
    stream(config(folder, learning_rate=[0.5]), tmp_path / "out")
    add(models, folder, 2)
    result = stream(config(folder, learning_rate=[0.5, 0.25]), tmp_path / "out")
    assert [record.learning_rate for record in result.steps] == [0.5, 0.25]


def test_a_list_may_grow_and_what_it_named_may_go(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2, 3))
    listed = [str(folder / "run" / f"checkpoint-{n}") for n in (3, 1, 2)]
    stream(config(folder, checkpoints=listed[:2]), tmp_path / "out")
    shutil.rmtree(listed[0])
    assert len(stream(config(folder, checkpoints=listed), tmp_path / "out").steps) == 3
    with pytest.raises(
        InputError, match=r"what step 1 merges was .*checkpoint-3 and is now .*checkpoint-1"
    ):
        stream(config(folder, checkpoints=listed[1:]), tmp_path / "out")
    with pytest.raises(InputError, match="was among the checkpoints and is now gone from them"):
        stream(config(folder, checkpoints=listed[:2]), tmp_path / "out")


def test_a_list_is_no_beginning_of_a_directory(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1,))
    listed = [str(add(models, folder, 2))]
    stream(config(folder, checkpoints=listed), tmp_path / "out")
    with pytest.raises(InputError, match=r"checkpoints was not set and is now .*/run; put"):
        stream(config(folder), tmp_path / "out")


def test_an_adapter_is_recognised_beside_its_model() -> None:
    model, one, other = "a" * 64, "b" * 64, "c" * 64
    assert shortened(model) == model[:16]
    assert shortened(f"{model}+{one}") != shortened(f"{model}+{other}")


def test_more_passes_go_on(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2))
    stream(config(folder), tmp_path / "out")
    again = stream(config(folder, passes=2), tmp_path / "out")
    assert names(again) == ["1", "2", "1", "2"]
    whole = stream(config(folder, passes=2), tmp_path / "whole")
    assert same_model(again.model, whole.model)


def test_a_checkpoint_that_has_become_whole_is_merged(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2))
    file = folder / "run" / "checkpoint-2" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert names(stream(config(folder), tmp_path / "out")) == ["1"]
    file.write_bytes(content)
    assert names(stream(config(folder), tmp_path / "out")) == ["1", "2"]


def test_one_that_comes_too_late_is_left_out(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 3))
    stream(config(folder), tmp_path / "out")
    add(models, folder, 2)
    notes: list[str] = []
    result = stream(config(folder), tmp_path / "out", say=notes.append)
    assert names(result) == ["1", "3"]
    assert any("checkpoint-2 is left out: a later checkpoint" in note for note in notes)


def test_a_schedule_of_its_own_length_may_be_appended_to(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2))
    rule = {"schedule": "linear", "peak": 0.6, "final": 0.2}
    stream(config(folder, learning_rate=rule), tmp_path / "out")
    add(models, folder, 3)
    with pytest.raises(InputError, match=r"learning_rate of step 2 was 0.2 and is now 0.4 \(a sch"):
        stream(config(folder, learning_rate=rule), tmp_path / "out")
    result = stream(config(folder, learning_rate={**rule, "steps": 2}), tmp_path / "out")
    assert [record.learning_rate for record in result.steps] == pytest.approx([0.6, 0.2, 0.2])


def test_patience_may_be_raised(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2, 3))
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("1\n2\n3\n0\n")
    command = f"test {{model}} && head -n1 {numbers} && sed -i 1d {numbers}"
    evaluation = {"metric_command": command, "metric_goal": "minimize", "patience": 1}
    first = stream(config(folder, evaluation=evaluation), tmp_path / "out")
    assert (names(first), first.chosen) == (["1"], 0)
    evaluation["patience"] = 3
    second = stream(config(folder, evaluation=evaluation), tmp_path / "out")
    assert (names(second), second.chosen) == (["1", "2", "3"], 3)


def test_another_judge_scores_again_and_says_so(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2, 3))
    keep = StreamOptions(keep="all")
    stream(judged(models, folder), tmp_path / "out", keep)
    evaluation = {"dataset": str(models / "other.jsonl")}
    notes: list[str] = []
    again = stream(config(folder, evaluation=evaluation), tmp_path / "out", keep, say=notes.append)
    fresh = stream(config(folder, evaluation=evaluation), tmp_path / "fresh", keep)
    assert any("the judge has changed" in note for note in notes)
    for one, other in zip(again.steps, fresh.steps, strict=True):
        assert one.current == pytest.approx(other.current)
        assert one.merged[0].scores == pytest.approx(other.merged[0].scores)
        assert one.best_step == other.best_step
    assert same_model(again.model, fresh.model)
    assert again.average == pytest.approx(fresh.average)


def test_a_step_without_weights_has_no_score_from_another_judge(
    models: Path, tmp_path: Path
) -> None:
    folder = scene(models, tmp_path, (1, 2, 3))
    stream(judged(models, folder, keep="last"), tmp_path / "out")
    notes: list[str] = []
    evaluation = {"dataset": str(models / "other.jsonl"), "keep": "last"}
    result = stream(config(folder, evaluation=evaluation), tmp_path / "out", say=notes.append)
    assert [bool(record.current) for record in result.steps] == [False, False, True]
    assert any("steps without weights have no score any more: 1, 2" in note for note in notes)


def test_finished_early_and_gone_on_with(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2))
    out = tmp_path / "out"
    with pytest.raises(Failure, match="no checkpoint was merged"):
        stream(config(folder), tmp_path / "empty", StreamOptions(finish=True))

    class Enough(Exception):
        pass

    def stop(record: Any) -> None:
        raise Enough

    with pytest.raises(Enough):
        stream(config(folder), out, on_step=stop)
    early = stream(config(folder), out, StreamOptions(finish=True))
    assert (names(early), early.chosen) == (["1"], 1)
    assert same_model(early.model, out / "steps/001/model")
    late = stream(config(folder), out)
    assert names(late) == ["1", "2"]
    assert same_model(late.model, out / "steps/002/model")


def test_what_keep_best_threw_away_is_named(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2))
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("3\n1\n2\n")
    command = f"test {{model}} && head -n1 {numbers} && sed -i 1d {numbers}"
    evaluation = {"metric_command": command, "metric_goal": "minimize"}
    stream(config(folder, evaluation=evaluation), tmp_path / "out", StreamOptions(keep="best"))
    add(models, folder, 3)
    with pytest.raises(InputError, match="the float32 weights of step 2 are gone"):
        stream(config(folder, evaluation=evaluation), tmp_path / "out")


def spoil(checkpoint: Path, how: str) -> None:
    if how == "gone":
        shutil.rmtree(checkpoint)
    elif how == "truncated":
        file = checkpoint / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    else:
        broken = perturbed(tiny_llama(0), 1)
        broken.model.layers[1].mlp.up_proj.weight.data[3, 5] = float(how)
        broken.save_pretrained(checkpoint)


@pytest.mark.parametrize("how", ["nan", "inf", "gone", "truncated"])
def test_a_bad_checkpoint_is_skipped_and_said(models: Path, tmp_path: Path, how: str) -> None:
    folder = scene(models, tmp_path, (1, 2, 3))
    document, out = judged(models, folder), tmp_path / "out"
    notes: list[str] = []

    def spoil_the_second(record: Any) -> None:
        if record.step == 1:
            spoil(folder / "run" / "checkpoint-2", how)

    listed = [str(folder / "run" / f"checkpoint-{n}") for n in (1, 2, 3)]
    document = {**document, "checkpoints": listed}
    result = stream(document, out, say=notes.append, on_step=spoil_the_second)
    assert [Path(record.checkpoint).name for record in result.steps] == [
        "checkpoint-1", "checkpoint-3",
    ]  # fmt: skip
    (skipped,) = result.skipped
    reason = {"gone": "no such directory", "truncated": "truncated"}.get(how, "no finite number")
    assert reason in skipped.reason
    assert any("checkpoint-2 is skipped" in note and reason in note for note in notes)
    assert "checkpoint-2: " in (result.model / "README.md").read_text()
    lines = [json.loads(line) for line in (out / "stream.jsonl").read_text().splitlines()]
    assert [Path(line["checkpoint"]).name for line in lines] == [
        f"checkpoint-{n}" for n in (1, 2, 3)
    ]
    assert lines[1]["reason"] == skipped.reason
    before = digest(out)
    assert len(stream(document, out).steps) == 2  # and it stays skipped
    assert digest(out) == before


def test_a_bad_checkpoint_is_no_step_of_a_list_of_rates(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2, 3))
    spoil(folder / "run" / "checkpoint-2", "nan")
    result = stream(config(folder, learning_rate=[0.5, 0.4, 0.3]), tmp_path / "out")
    assert [record.learning_rate for record in result.steps] == [0.5, 0.3]


def test_the_last_one_is_tried_again(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2))
    spoil(folder / "run" / "checkpoint-2", "nan")
    assert names(stream(config(folder), tmp_path / "out")) == ["1"]
    shutil.rmtree(folder / "run" / "checkpoint-2")
    add(models, folder, 2)
    result = stream(config(folder), tmp_path / "out")
    assert names(result) == ["1", "2"]
    assert not result.skipped


def test_strict_ends_at_a_bad_checkpoint(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2))
    spoil(folder / "run" / "checkpoint-2", "nan")
    with pytest.raises(Failure, match=r"checkpoint-2 cannot be merged \(--strict\): .*up_proj"):
        stream(config(folder), tmp_path / "out", StreamOptions(strict=True))
    assert names(stream(config(folder), tmp_path / "out")) == ["1"]


def test_one_that_is_deleted_during_its_merge_is_skipped(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = scene(models, tmp_path, (1, 2, 3))
    merge = step_module.merge

    def rotating(document: Any, text: str, *rest: Any) -> None:
        if "checkpoint-2" in text:
            shutil.rmtree(folder / "run" / "checkpoint-2")
        merge(document, text, *rest)

    monkeypatch.setattr(step_module, "merge", rotating)
    assert names(stream(config(folder), tmp_path / "out")) == ["1", "3"]


def test_nothing_but_bad_checkpoints_is_a_failure(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1,))
    spoil(folder / "run" / "checkpoint-1", "nan")
    with pytest.raises(Failure, match=r"no checkpoint was merged \(checkpoint-1: .*up_proj"):
        stream(config(folder), tmp_path / "out")
    assert not (tmp_path / "out" / "model").exists()


def test_a_list_that_never_was_right_is_refused_at_once(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1,))
    listed = [str(folder / "run" / f"checkpoint-{n}") for n in (1, 99)]
    with pytest.raises(InputError, match="checkpoint-99: no such directory"):
        stream(config(folder, checkpoints=listed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_what_is_done_and_what_comes(models: Path, tmp_path: Path) -> None:
    folder = scene(models, tmp_path, (1, 2))
    spoil(folder / "run" / "checkpoint-1", "nan")
    document = load_config(config(folder))
    stream(document, tmp_path / "out")
    add(models, folder, 3)
    found = forecast_stream(document, tmp_path / "out", StreamOptions())
    assert found.plan is not None
    assert found.state is not None
    assert not found.problems
    assert [one.checkpoint for one in found.state.handled] == ["checkpoint-1", "checkpoint-2"]
    (coming,) = found.plan.steps(found.state)
    assert (coming.step, coming.name) == (2, "checkpoint-3")
    assert found.seconds is not None
    assert not math.isnan(found.seconds)
