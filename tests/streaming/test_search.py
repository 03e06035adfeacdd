"""Learning rates that a step finds out, that differ by run, by layer or by filter."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.errors import InputError
from mergekit_arm.streaming import StreamOptions, stream
from mergekit_arm.streaming.config import load_config
from mergekit_arm.streaming.rates import LineSearch, PerRun, Schedule, rate_text, read_rates, scaled
from mergekit_arm.streaming.step import step as step_module
from tests.support.streams import config, weights, write_run

MINIMAL = {"merge_method": "task_arithmetic", "base_model": "base", "checkpoints": "run"}
UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, (1, 2, 3))
    return folder


def quadratic(folder: Path, run: Path, optimum: float) -> dict[str, Any]:
    """Return an evaluation by a command whose optimum is known.

    It prints (s − optimum)², s being how far the model is from the base on the way to the first
    checkpoint, by one weight.
    """
    script = folder / "score.py"
    script.write_text(
        "import sys\nfrom safetensors.numpy import load_file\n"
        "a, b, c = (load_file(p + '/model.safetensors')"
        f"['{UP}'].astype(float) for p in sys.argv[1:])\n"
        f"print(float((((c - a) * (b - a)).sum() / ((b - a) ** 2).sum() - {optimum}) ** 2))\n"
    )
    command = f"{sys.executable} {script} {run}/base {run}/run/checkpoint-1 {{model}}"
    return {"metric_command": command, "metric_goal": "minimize"}


def test_a_step_takes_the_best_rate_and_records_all(run: Path, tmp_path: Path) -> None:
    document = config(
        run,
        checkpoints=[str(run / "run" / "checkpoint-1")],
        learning_rate={"search": [0.25, 0.5, 1.0, 1.5]},
        evaluation=quadratic(tmp_path, run, 0.6),
    )
    result = stream(document, tmp_path / "out")
    (record,) = result.steps
    assert record.learning_rate == 0.5
    assert [one.rates for one in record.tried] == [[0.25], [0.5], [1.0], [1.5]]
    found = [one.scores["metric"] for one in record.tried]
    assert found == pytest.approx([(rate - 0.6) ** 2 for rate in (0.25, 0.5, 1.0, 1.5)], abs=1e-6)
    line = json.loads((tmp_path / "out" / "stream.jsonl").read_text())
    assert [one["rates"] for one in line["tried"]] == [[0.25], [0.5], [1.0], [1.5]]
    base, goal, merged = (
        weights(path) for path in (run / "base", run / "run" / "checkpoint-1", result.model)
    )
    assert all(torch.allclose(merged[n], (base[n] + goal[n]) / 2, atol=1e-6) for n in merged)


def test_no_step_is_among_the_candidates(run: Path, tmp_path: Path) -> None:
    document = config(
        run,
        checkpoints=[str(run / "run" / f"checkpoint-{n}") for n in (1, 2)],
        learning_rate={"search": [0, 0.5, 1.0]},
        evaluation=quadratic(tmp_path, run, 0.1),  # 0 is nearer than 0.5
    )
    result = stream(document, tmp_path / "out")
    assert [(one.accepted, one.learning_rate) for one in result.steps] == [(False, 0.0)] * 2
    assert [len(one.tried) for one in result.steps] == [2, 2]
    assert result.chosen == 0
    scores = [record.current["metric"] for record in result.steps]
    assert scores == [result.steps[0].base["metric"]] * 2


def test_a_killed_search_goes_on_where_it_was(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = config(
        run,
        learning_rate={"search": [0.25, 0.5, 1.0]},
        evaluation=quadratic(tmp_path, run, 0.4),
    )
    whole = stream(document, tmp_path / "whole")
    merge, merged = step_module.merge, []

    def dying(document: Any, *rest: Any) -> None:
        merged.append(document["models"][0]["parameters"]["weight"])
        if len(merged) == 3:
            raise KeyboardInterrupt
        merge(document, *rest)

    monkeypatch.setattr(step_module, "merge", dying)
    with pytest.raises(KeyboardInterrupt):
        stream(document, tmp_path / "out")
    again = stream(document, tmp_path / "out")
    assert merged[:4] == [0.25, 0.5, 1.0, 1.0]  # the first two were judged, and are not again
    assert [one.tried for one in again.steps] == [one.tried for one in whole.steps]
    first, second = weights(whole.model), weights(again.model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_runs_are_merged_together_each_with_its_rate(run: Path, tmp_path: Path) -> None:
    """Also by ARM, and by hand."""
    first, second, third = (str(run / "run" / f"checkpoint-{n}") for n in (1, 2, 3))
    document = config(
        run,
        merge_method="arm",
        parameters={"rotation": 0},
        calibration={"dataset": str(run / "tokens.jsonl")},
        checkpoints=[[first, second], [second, third]],
        learning_rate={"runs": [0.5, {"schedule": "linear", "peak": 0.4, "final": 0.2}]},
    )
    out = tmp_path / "out"
    result = stream(document, out, StreamOptions(keep="all"))
    assert [record.learning_rate for record in result.steps] == [[0.5, 0.4], [0.5, 0.2]]
    assert [len(record.merged) for record in result.steps] == [2, 2]
    one, two, three = (weights(Path(path)) for path in (first, second, third))
    expected = weights(run / "base")
    for (a, b), (r, s) in (((one, two), (0.5, 0.4)), ((two, three), (0.5, 0.2))):
        expected = {n: w + r * (a[n] - w) + s * (b[n] - w) for n, w in expected.items()}
    found = weights(result.model)
    assert all(torch.allclose(found[n], expected[n], atol=1e-6) for n in found)
    arguments = [str(out / "steps/002/config.yml"), str(tmp_path / "again"), "--quiet"]
    assert CliRunner().invoke(mergekit_yaml, arguments).exit_code == 0
    by_hand, kept = weights(tmp_path / "again"), weights(out / "steps/002/model")
    assert all(torch.equal(by_hand[name], kept[name]) for name in kept)


def test_rates_by_filter_and_layer(run: Path, tmp_path: Path) -> None:
    rates = [{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 1.0}]
    result = stream(config(run, learning_rate=rates, passes=1), tmp_path / "out")
    expected = {name: w.double() for name, w in weights(run / "base").items()}
    for number in (1, 2, 3):
        goal = weights(run / "run" / f"checkpoint-{number}")
        for name, weight in expected.items():
            layer = 0.2 if ".layers.0." in name else 0.6
            rate = layer if "mlp" in name else 1.0
            expected[name] = weight + rate * (goal[name].double() - weight)
    found = weights(result.model)
    assert all(torch.allclose(found[n].double(), expected[n], atol=1e-6) for n in found)
    document = yaml.safe_load((tmp_path / "out/steps/001/config.yml").read_text())
    assert document["models"][0]["parameters"]["weight"] == rates


def test_halving_halves_under_every_filter() -> None:
    rates = [{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 1.0}]
    assert scaled(rates, 0.5) == [{"filter": "mlp", "value": [0.1, 0.3]}, {"value": 0.5}]
    assert scaled(0.5, 0.25) == 0.125
    assert rate_text(rates) == "mlp 0.2, 0.6, 1"


def test_every_form_is_told_by_its_look() -> None:
    assert read_rates({"search": [0, 0.5, 0.5, 1]}) == LineSearch(search=[0.5, 1])
    assert read_rates({"runs": [0.5, {"schedule": "linear", "peak": 1}]}) == PerRun(
        runs=[0.5, Schedule(schedule="linear", peak=1)]
    )
    assert read_rates({"value": [0.1, 0.5]}) == [{"value": [0.1, 0.5]}]
    assert read_rates([0.5, [0.1, 0.2], [{"value": 1}]]) == [0.5, [0.1, 0.2], [{"value": 1.0}]]
    for rates in ({"search": [0.5, 1]}, {"runs": [0.5, 1]}, [{"value": 0.5}], [[0.1, 0.2]]):
        found = load_config({**MINIMAL, "learning_rate": rates})
        assert load_config(found.document()) == found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": {"search": []}}, "learning_rate.search: list should have at least 1"),
        ({"learning_rate": {"search": [3]}}, "learning_rate.search: must lie in (0, 2], not 3"),
        ({"learning_rate": {"serch": [1]}}, "did you mean 'search'?"),
        ({"learning_rate": [{"fliter": "mlp", "value": 0.5}]}, "must be {filter: …, value: …}"),
    ],
)
def test_a_wrong_form_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config({**MINIMAL, **changes})
    assert said in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": {"search": [0.5]}}, "a search needs an evaluation to choose by"),
        (
            {"learning_rate": {"search": [0.5]}, "backtrack": True},
            "a search tries rates already, and 0 among them",
        ),
        ({"learning_rate": {"runs": [0.5, 0.5]}}, "has rates for 2 runs, but step 1 merges 1"),
        ({"merge_method": "slerp", "checkpoints": 2}, "slerp cannot be a step, which merges 2"),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], said: str, run: Path, tmp_path: Path
) -> None:
    if changes.pop("backtrack", False):
        changes["evaluation"] = {"dataset": str(run / "tokens.jsonl"), "backtrack": True}
    if changes.get("checkpoints") == 2:
        changes["checkpoints"] = [[str(run / "run" / f"checkpoint-{n}") for n in (1, 2)]]
    with pytest.raises(InputError) as caught:
        stream(config(run, **changes), tmp_path / "out")
    assert said in caught.value.message
