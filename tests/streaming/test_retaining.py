"""A stream of steps that do not forget: two texts, one pass over the model for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from mergekit_arm.errors import InputError
from mergekit_arm.merging.merge import merge
from mergekit_arm.streaming import StreamOptions, stream
from mergekit_arm.streaming.config import load_config
from mergekit_arm.streaming.forecast import forecast_stream
from mergekit_arm.streaming.plan.method import fit_method
from mergekit_arm.streaming.plan.plan import make_plan
from tests.support.merges import weights
from tests.support.moments_reference import turned
from tests.support.stored import Folder
from tests.support.streams import config, write_run, write_tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    write_tokens(folder / "task.jsonl", 9, rows=3)
    return folder


def texts(run: Path, **changes: Any) -> dict[str, Any]:
    return {
        "general": {"dataset": str(run / "tokens.jsonl")},
        "task": {"dataset": str(run / "task.jsonl")},
        **changes,
    }


def retaining(run: Path, **changes: Any) -> dict[str, Any]:
    settings = {"merge_method": "arm", "parameters": {"retain": 1.0}, "calibration": texts(run)}
    return config(run, **{**settings, **changes})


def test_every_step_turns_by_both_texts(run: Path, tmp_path: Path) -> None:
    """Each from what its own directory holds; the model is measured afresh every second step."""
    out = tmp_path / "out"
    calibration = texts(run, refresh=2)
    result = stream(retaining(run, calibration=calibration), out, StreamOptions(keep="all"))
    assert [one.statistics_from for one in result.steps] == [1, 1, 3]
    assert [one.calibration_tokens for one in result.steps] == [8 * 24 + 3 * 24, 0, 8 * 24 + 3 * 24]
    current = weights(run / "base")
    for step, number in enumerate((10, 20, 30), start=1):
        folder = out / "steps" / f"{step:03d}"
        own = out / "steps" / f"{1 if step < 3 else 3:03d}"
        general, task = (Folder.open(own / n) for n in ("statistics", "task_statistics"))
        incoming, merged = weights(run / "run" / f"checkpoint-{number}"), weights(folder / "model")
        count = 0
        for name, weight in current.items():
            tau = (incoming[name].double() - weight.double()).numpy()
            moments = [one.stored(name) for one in (task, general)]
            if moments[0] is not None and moments[1] is not None:
                tau = turned(tau, moments[0].dense(0.9), moments[1].dense(0.9), 1.0, 1.0)
                count += 1
            wanted = weight.double() + 0.5 * torch.from_numpy(tau)
            torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-4, atol=5e-6)
        assert count == 14
        facts = json.loads((folder / "statistics.json").read_text())
        assert Path(facts["data"]["dataset"]).name == "tokens.jsonl"
        assert Path(facts["task"]["data"]["dataset"]).name == "task.jsonl"
        current = merged


@pytest.mark.parametrize(("refresh", "kept"), [("once", ["001"]), ("every", []), (2, ["003"])])
def test_only_what_an_appended_step_would_read_is_kept(
    run: Path, tmp_path: Path, refresh: Any, kept: list[str]
) -> None:
    stream(retaining(run, calibration=texts(run, refresh=refresh)), tmp_path / "out")
    for name in ("statistics", "task_statistics"):
        found = [path.parent.name for path in (tmp_path / "out").rglob(name)]
        assert found == kept


def test_a_resumed_stream_ends_alike(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = retaining(run, calibration=texts(run, refresh="every"))
    whole = stream(document, tmp_path / "whole")

    class Enough(BaseException):
        pass

    # Ended after the second step's statistics were there, before its model was.
    calls = []

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise Enough
        merge(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("mergekit_arm.streaming.step.step.merge", counted)
        with pytest.raises(Enough):
            stream(document, tmp_path / "out")
    assert (tmp_path / "out" / "steps" / "002" / "task_statistics").is_dir()
    again = stream(document, tmp_path / "out")
    first, second = (load_file(one.model / "model.safetensors") for one in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_section_is_read_and_written_alike(run: Path) -> None:
    shared = texts(run, samples=64, refresh="every")
    found = load_config(retaining(run, calibration=shared))
    assert found.calibration is not None
    general, task = found.calibration.passes()
    assert (general["samples"], task["samples"]) == (64, 64)
    assert (general["dataset"], task["dataset"]) == tuple(
        str(run / name) for name in ("tokens.jsonl", "task.jsonl")
    )
    assert load_config(found.document()) == found


@pytest.mark.parametrize(
    ("calibration", "said"),
    [
        ({"general": {"dataset": "x"}}, "general and task belong together"),
        ({"general": "x", "task": "y"}, "each a mapping such as {dataset: ./task.jsonl}"),
        ({"general": {"samples": 3}, "task": {"dataset": "y"}}, "each need a dataset"),
        ({"general": {"datset": "x"}, "task": {}}, "each need a dataset"),
        (
            {"general": {"dataset": "x", "sample": 3}, "task": {"dataset": "y"}},
            "unknown key 'sample' (did you mean 'samples'?)",
        ),
    ],
)
def test_sections_that_are_refused(calibration: dict[str, Any], said: str, run: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_config(retaining(run, calibration=calibration))
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parameters": {"rotation": -0.4}}, "rotation has no meaning with task_stats"),
        ({"merge_method": "aim", "parameters": {}}, "calibration.task: aim has no use for it"),
    ],
)
def test_methods_and_parameters_that_are_refused(
    changes: dict[str, Any], said: str, run: Path
) -> None:
    _, problems = make_plan(load_config(retaining(run, **changes)), MergeOptions())
    assert any(said in problem for problem in problems), problems


def test_without_the_task_its_parameters_are_refused() -> None:
    with pytest.raises(InputError, match="turn has no meaning without task_stats, which"):
        fit_method("arm", {"turn": 0.5})


@pytest.mark.parametrize("name", ["regmean", "aim_regmean"])
def test_what_weighs_models_against_each_other_is_no_step(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} weighs models against each other, and a step"):
        fit_method(name, {})


def test_both_texts_are_looked_at_before_the_first_step(run: Path, tmp_path: Path) -> None:
    calibration = texts(run, task={"dataset": str(run / "nowhere.jsonl")})
    document = load_config(retaining(run, calibration=calibration))
    found = forecast_stream(document, tmp_path / "out", StreamOptions())
    assert any("nowhere.jsonl" in problem for problem in found.problems)


def test_another_text_under_the_same_name_is_another_stream(run: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "task.jsonl", 1)
    calibration = texts(run, task={"dataset": str(tmp_path / "task.jsonl")})
    stream(retaining(run, calibration=calibration), tmp_path / "out")
    write_tokens(tmp_path / "task.jsonl", 2)
    with pytest.raises(InputError, match=r"content of the calibration\.task data"):
        stream(retaining(run, calibration=calibration), tmp_path / "out")


def test_aim_over_it_reads_both(run: Path, tmp_path: Path) -> None:
    parameters = {"retain": 1.0, "omega": 1.0}
    relaxed = stream(
        retaining(run, merge_method="aim_arm", parameters=parameters), tmp_path / "aim"
    )
    plain = stream(retaining(run), tmp_path / "arm")
    first, second = (weights(one.model) for one in (relaxed, plain))
    assert all(torch.equal(first[name], second[name]) for name in first)
