"""What changes between two runs of a stream that was killed, or that has merged nothing yet."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_arm.errors import Failure, InputError
from mergekit_arm.models.contents import describe
from mergekit_arm.streaming import StreamOptions, stream
from mergekit_arm.streaming.config import load_config
from mergekit_arm.streaming.forecast import forecast_stream
from mergekit_arm.streaming.options import WatchOptions
from mergekit_arm.streaming.state import State, read_state
from mergekit_arm.streaming.step import step as step_module
from tests.support.models import perturbed, tiny_llama
from tests.support.streams import config, weights, write_run, write_tokens


class Killed(BaseException):
    """In the place of a signal."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path, (1, 2))
    write_tokens(tmp_path / "heldout.jsonl", 7, rows=2)
    return tmp_path


def judged(folder: Path, **changes: Any) -> dict[str, Any]:
    return config(folder, evaluation={"dataset": str(folder / "heldout.jsonl")}, **changes)


def killed(
    document: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    """Run a stream that dies when it has judged so many merges."""
    save, seen = State.save, [0]

    def die(state: State, out: Path) -> None:
        save(state, out)
        seen[0] += len(state.tried) > 0
        if seen[0] == attempts:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(State, "save", die)
        with pytest.raises(Killed):
            stream(document, out)


def models_alike(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_what_was_judged_at_other_rates_is_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(judged(folder, learning_rate={"search": [0.25, 0.5]}), folder / "out", monkeypatch, 1)
    document = judged(folder, learning_rate={"search": [1.0, 0.5]})
    result = stream(document, folder / "out")
    assert [[one.rates for one in step.tried] for step in result.steps] == [[[1.0], [0.5]]] * 2
    assert models_alike(result.model, stream(document, folder / "whole").model)


def test_a_lower_rate_is_a_remedy(folder: Path) -> None:
    """A merge that overflowed is not taken for the one at the rate that was advised."""
    broken = tiny_llama(5)
    with torch.no_grad():
        broken.lm_head.weight.fill_(3e38)
    broken.save_pretrained(folder / "run" / "checkpoint-1")
    with pytest.raises(Failure, match="try a lower learning_rate"):
        stream(config(folder, learning_rate=2.0), folder / "out")
    result = stream(config(folder, learning_rate=0.5), folder / "out")
    assert [step.learning_rate for step in result.steps] == [0.5, 0.5]


def test_a_checkpoint_that_was_written_anew_is_merged_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(judged(folder), folder / "out", monkeypatch, 1)
    one = folder / "run" / "checkpoint-1"
    perturbed(tiny_llama(0), 99).save_pretrained(one)
    result = stream(judged(folder), folder / "out")
    assert result.steps[0].merged[0].content == describe(str(one)).fingerprint
    assert models_alike(result.model, stream(judged(folder), folder / "whole").model)


def test_a_stream_that_has_merged_nothing_begins_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the measurement that is there, if it would be made alike."""
    calibration = {"dataset": str(folder / "tokens.jsonl")}
    document = judged(folder, merge_method="arm", calibration=calibration)
    killed(document, folder / "out", monkeypatch, 1)
    measured = folder / "out" / "steps" / "001" / "statistics" / "activation_stats.json"
    before, notes = measured.stat().st_mtime_ns, list[str]()
    document["parameters"] = {"rotation": -0.5}
    monkeypatch.setattr(step_module, "measure_step", measure := Counting(step_module.measure_step))
    result = stream(document, folder / "out", say=notes.append)
    assert any("the stream begins again: parameters was not set" in note for note in notes)
    assert measure.times == [before, before]
    assert models_alike(result.model, stream(document, folder / "whole").model)

    killed(document, folder / "other", monkeypatch, 1)
    document["calibration"] = {**calibration, "samples": 3}
    changed = stream(document, folder / "other")
    assert changed.steps[0].calibration_tokens < result.steps[0].calibration_tokens


class Counting:
    """Notes when the statistics that a step reads were written."""

    def __init__(self, measure: Any) -> None:
        self.measure, self.times = measure, list[int]()

    def __call__(self, *given: Any) -> Any:
        measured = self.measure(*given)
        found = Path(measured.shared["activation_stats"]) / "activation_stats.json"
        self.times.append(found.stat().st_mtime_ns)
        return measured


def test_published_statistics_that_were_measured_anew_are_another_stream(
    folder: Path, measure: Any
) -> None:
    published = measure(folder / "base", folder / "stats")
    document = config(folder, merge_method="arm", parameters={"activation_stats": str(published)})
    stream(document, folder / "out")
    shutil.rmtree(published)
    measure(folder / "base", published, samples=3)
    with pytest.raises(InputError, match=r"another stream: content of parameters\.activation_st"):
        stream(document, folder / "out")


def test_data_in_a_directory_is_recognised(folder: Path) -> None:
    texts = folder / "texts"
    texts.mkdir()
    write_tokens(texts / "a.jsonl", 8, rows=2)
    document = config(folder, evaluation={"dataset": str(texts)})
    first, notes = stream(document, folder / "out"), list[str]()
    write_tokens(texts / "a.jsonl", 9, rows=2)
    second = stream(document, folder / "out", say=notes.append)
    assert any("the judge has changed (content of the loss data" in note for note in notes)
    assert second.steps[0].base != first.steps[0].base


def test_a_best_step_whose_weights_are_gone_is_named(folder: Path) -> None:
    first_is_best = "echo {model} | grep -c steps/001 || true"
    evaluation = {"metric_command": first_is_best, "metric_goal": "maximize", "keep": "last"}
    stream(config(folder, evaluation=evaluation), folder / "out")
    document = config(folder, evaluation={**evaluation, "keep": "best"})
    with pytest.raises(InputError, match="step 1 would become the model"):
        stream(document, folder / "out")


def test_what_was_skipped_and_is_gone_from_the_list_is_named(folder: Path) -> None:
    listed = [
        str(folder / "run" / "checkpoint-1"),
        str(folder / "bad"),
        str(folder / "run" / "checkpoint-2"),
    ]
    broken = tiny_llama(5)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    broken.save_pretrained(folder / "bad")
    stream(config(folder, checkpoints=listed), folder / "out")
    with pytest.raises(InputError, match=r"3 with what was skipped \(.*bad\) and is now 2"):
        stream(config(folder, checkpoints=[listed[0], listed[2]]), folder / "out")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": {"energy": "5e-1"}}, None),
        ({"parameters": {"energy": []}}, "an empty list"),
        ({"parameters": {"energy": 1.5}}, "energy must lie in (0, 1]"),
        ({"parameters": {"energy": None}}, "mergekit does not accept it: parameters.energy"),
        ({"parameters": {"task_stats": "stats"}, "refresh": "every"}, "name both texts"),
        ({"parameters": {"activation_stats": "narrow", "energy": 0.9}}, "energy 0.9 asked for"),
        ({"parameters": {"activation_stats": "stats"}, "task": "./no.jsonl"}, "no.jsonl"),
    ],
)
def test_a_plan_says_it_first(
    folder: Path, measure: Any, changes: dict[str, Any], said: str | None
) -> None:
    stats = str(measure(folder / "base", folder / "stats"))
    narrow = str(measure(folder / "base", folder / "narrow", energy=0.01))
    parameters = {
        key: {"stats": stats, "narrow": narrow}.get(str(value), value)
        for key, value in changes["parameters"].items()
    }
    tokens = str(folder / "tokens.jsonl")
    calibration: dict[str, Any] = {"dataset": tokens}
    if "task" in changes:
        calibration = {"general": calibration, "task": {"dataset": changes["task"]}}
    if "refresh" in changes:
        calibration["refresh"] = changes["refresh"]
    document = config(folder, merge_method="arm", parameters=parameters, calibration=calibration)
    problems = forecast_stream(document, folder / "out").problems
    assert (not problems) if said is None else (len(problems) == 1 and said in problems[0])


def test_what_is_retained_is_measured_whole(folder: Path, measure: Any) -> None:
    task = str(measure(folder / "base", folder / "task"))
    calibration = {"dataset": str(folder / "tokens.jsonl")}
    parameters = {"task_stats": task}
    document = config(folder, merge_method="arm", parameters=parameters, calibration=calibration)
    plan = forecast_stream(document, folder / "out").plan
    assert plan is not None
    assert plan.calibration is not None
    assert plan.calibration.settings["energy"] == 0.9


def test_a_set_may_be_called_metric(folder: Path) -> None:
    """Names that the file gives are no guess at what it leaves out."""
    data = {"dataset": str(folder / "heldout.jsonl")}
    command = {"metric_command": "echo {model}", "goal": "maximize"}
    named = load_config(config(folder, evaluation={"loss": data, "metric": command}))
    unnamed = load_config(
        config(
            folder, evaluation={**data, "metric_command": "echo {model}", "metric_goal": "maximize"}
        )
    )
    assert named.evaluation is not None
    assert unnamed.evaluation is not None
    assert named.evaluation.deciding == ["loss", "metric"]
    assert unnamed.evaluation.deciding == ["metric"]
    assert load_config(unnamed).evaluation.deciding == ["metric"]  # type: ignore[union-attr]


def test_the_state_says_what_is_being_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(judged(folder), folder / "out", monkeypatch, 1)
    state = read_state(folder / "out")
    assert state is not None
    assert len(state.tried) == 1
    assert describe(str(folder / "run" / "checkpoint-1")).fingerprint in state.making


def test_the_average_finds_checkpoints_where_they_were_followed(folder: Path) -> None:
    """A stream removes what it took of a run; the run may still have it."""
    (folder / "run" / "stream.end").touch()
    options = StreamOptions(watch=WatchOptions(poll=0.05))
    result = stream(judged(folder), folder / "out", options)
    listed = [str(folder / "run" / f"checkpoint-{number}") for number in (1, 2)]
    whole = stream(judged(folder, checkpoints=listed), folder / "whole")
    assert result.average == whole.average != {}
    shutil.rmtree(folder / "run" / "checkpoint-1")
    write_run(folder, (3,))
    again = stream(judged(folder), folder / "out", options)
    assert not again.average
