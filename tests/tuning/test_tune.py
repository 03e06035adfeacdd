"""A search as a whole: optima that are known, what it leaves, and that it goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import optuna
import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.errors import InputError
from mergekit_arm.judging.judge import Judge
from mergekit_arm.judging.sets import HeldOutSet
from mergekit_arm.tuning import TuneOptions, tune
from tests.support.tuning import config, distance_set, lines, tensors, write_family, write_goal


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    write_family(folder)
    return folder


def unpruned(**more: Any) -> dict[str, Any]:
    return {"pruning": False, "baseline": False, **more}


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "grid"])
def test_a_known_optimum_is_found(family: Path, tmp_path: Path, sampler: str) -> None:
    goal = write_goal(family, a=0.37)
    sets = {"distance": distance_set(tmp_path, goal)}
    tuning = unpruned(evaluation=sets, trials=16, sampler=sampler)
    result = tune(config(family, tuning), tmp_path / "out", TuneOptions(model=False))
    assert len(result.trials) == 16
    weight = result.best.values["weight of a"]
    # The grid's points are 1/15 apart; the other samplers have 16 of [0, 1] to come near.
    assert weight == pytest.approx(0.37, abs=1 / 15)
    # Base is 0, and the best input is 1: at weight w, the distance is (w - 0.37)² |a - base|².
    for trial in result.trials:
        w = trial.values["weight of a"]
        assert isinstance(w, float)
        distances = {at: (at - 0.37) ** 2 for at in (0.0, 1.0)}
        # `a` is farther from the goal than the base; `b` is farther still.
        if w == weight:
            assert trial.gain is not None
            assert trial.gain > 0
            assert distances[0.0] < distances[1.0]


def test_gains_are_the_formula(family: Path, tmp_path: Path) -> None:
    """At weight w of one model, |w τ - 0.8 τ|² is 0.64, 0.04 and (w - 0.8)² for 0, 1 and w."""
    goal = write_goal(family, a=0.8)
    sets = {"distance": distance_set(tmp_path, goal)}
    tuning = unpruned(evaluation=sets, trials=5, sampler="grid")
    result = tune(config(family, tuning), tmp_path / "out", TuneOptions(model=False))
    assert [one.values["weight of a"] for one in result.trials] == [0, 0.25, 0.5, 0.75, 1]
    for trial in result.trials:
        w = trial.values["weight of a"]
        assert isinstance(w, float)
        expected = (0.64 - (w - 0.8) ** 2) / (0.64 - 0.04)
        assert trial.gain == pytest.approx(expected, abs=1e-4)
    assert result.best.values == {"weight of a": 0.75}


def test_what_it_leaves(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    test = {"test": {"held": {"dataset": str(family / "test.jsonl")}}}
    two = {name: {"dataset": str(family / f"{name}.jsonl")} for name in ("one", "two")}
    document = config(family, {"evaluation": two, "trials": 5, "pruning": False, **test})
    told: list[tuple[str, int, int]] = []
    result = tune(document, out, tell=lambda *one: told.append(one))
    best = yaml.safe_load((out / "best.yml").read_text())
    assert "tuning" not in best
    assert best["models"][0]["parameters"]["weight"] == result.best.values["weight of a"]
    # mergekit's own command makes of it what lies in OUT/model.
    done = CliRunner().invoke(mergekit_yaml, [str(out / "best.yml"), str(tmp_path / "by hand")])
    assert done.exit_code == 0
    ours, theirs = tensors(out / "model"), tensors(tmp_path / "by hand")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # The scores are those of the model that lies there, judged afresh.
    sets = {name: HeldOutSet(dataset=one["dataset"]) for name, one in two.items()}
    judge = Judge(sets, [], MergeOptions(), device="cpu", dtype="float32")
    again = judge.score(str(out / "model"), tmp_path)
    assert result.best.scores == pytest.approx(again, rel=1e-6)
    written = lines(out)
    assert [one["study"] for one in written] == ["baseline"] * 4 + ["tune"] * 5
    assert {one["values"]["weight"] for one in written[:4]} == {0.3, 0.5, 0.7, 1.0}
    assert written[4]["values"] == {"weight of a": 0.5}  # the middle: weight has no default
    labels = [label for label, _, _ in result.evaluation]
    assert labels[:3] == [str(family / name) for name in ("base", "a", "b")]
    assert labels[3].startswith("task arithmetic")
    assert [row[0] for row in result.test] == labels
    assert result.evaluation[0][1] == 0
    tested = Judge({"held": HeldOutSet(dataset=str(family / "test.jsonl"))}, [], MergeOptions())
    assert result.test[-1][2] == pytest.approx(tested.score(str(out / "model"), tmp_path))
    card = (out / "model" / "README.md").read_text()
    assert "Test, on which nothing was searched" in card
    assert str(tmp_path) not in card
    picture = matplotlib.image.imread(out / "tune.png")
    assert picture.shape[0] > 400
    assert len({tuple(pixel) for pixel in picture.reshape(-1, picture.shape[-1])[::7]}) > 5
    assert told[-1][1] == told[-1][2]
    left = {path.name for path in out.iterdir()}
    assert left <= {
        "best.yml", "model", "trials.jsonl", "tune.png", "tune_state.json", "study.db",
        "study.db-wal", "study.db-shm", ".lock", ".preparing.lock",
    }  # fmt: skip
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{out}/study.db")
    assert len(study.trials) == 5


def test_a_finished_search_returns_its_result_and_more_trials_go_on(
    family: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    document = config(family, unpruned(trials=3))
    first = tune(document, out)
    before = {p: p.stat().st_mtime_ns for p in (out / "model").iterdir() if p.name != "README.md"}
    again = tune(document, out)
    assert again.trials == first.trials
    assert {p: p.stat().st_mtime_ns for p in before} == before
    longer = tune(document, out, TuneOptions(trials=5, sampler="random"))
    assert longer.trials[:3] == first.trials
    assert len(longer.trials) == 5
    whole = tune(config(family, unpruned(trials=3)), tmp_path / "whole", TuneOptions(model=False))
    assert [one.values for one in whole.trials] == [one.values for one in first.trials]
    assert [one.scores for one in whole.trials] == [one.scores for one in first.trials]
    again = tune(document, out, TuneOptions(trials=6, seed=7))  # of the sampler alone
    assert again.trials[:5] == longer.trials
    other = config(family, unpruned(trials=3))
    other["models"][1]["parameters"]["weight"] = 0.1
    with pytest.raises(InputError, match="holds another search: models was"):
        tune(other, out)
    mine = out / "mine.txt"
    mine.write_text("kept")
    replaced = tune(other, out, TuneOptions(force=True, model=False))
    assert len(replaced.trials) == 3
    assert mine.read_text() == "kept"
    assert not (out / "model").exists()


def test_methods_are_compared_each_with_its_own_parameters(
    family: Path, tmp_path: Path, measure: Any
) -> None:
    measure(family / "base", tmp_path / "stats")
    document = config(
        family,
        unpruned(trials=8),
        merge_method={"tune": ["task_arithmetic", "ties", "aim", "linear"]},
        parameters={
            "activation_stats": str(tmp_path / "stats"),
            "omega": {"tune": [0.0, 1.0]},
            "weight": 1.0,
        },
    )
    result = tune(document, tmp_path / "out")
    methods = [one.method for one in result.trials]
    assert methods[:4] == ["task_arithmetic", "ties", "aim", "linear"]
    for one in result.trials:
        expected = {"weight of a"} | ({"omega"} if one.method == "aim" else set())
        assert set(one.values) == expected
    assert result.trials[2].values["omega"] == 0.4  # its default
    shared = result.document.get("parameters", {})
    assert ("omega" in shared) == (result.best.method == "aim")


def test_several_objectives_have_a_front(family: Path, tmp_path: Path) -> None:
    goals = {name: write_goal(tmp_copy(family, tmp_path / name), **{name: 0.5}) for name in "ab"}
    sets = {name: distance_set(tmp_path, goal) for name, goal in goals.items()}
    document = config(
        family, unpruned(evaluation=sets, trials=9, objective="pareto", sampler="grid")
    )
    document["models"][1]["parameters"]["weight"] = {"tune": [0.0, 1.0]}
    result = tune(document, tmp_path / "out", TuneOptions(model=False))
    points = {tuple(one.values.values()): one.gains for one in result.trials}
    assert len(points) == 9
    front = {tuple(one.values.values()) for one in result.front}
    expected = {
        key
        for key, gains in points.items()
        if not any(
            all(other[n] >= gains[n] for n in gains) and other != gains for other in points.values()
        )
    }
    assert front == expected
    assert (0.5, 0.0) in front
    assert (0.0, 0.5) in front
    assert result.hypervolume is not None
    assert result.hypervolume >= 0
    assert (tmp_path / "out" / "tune.png").stat().st_size > 10_000


def tmp_copy(family: Path, folder: Path) -> Path:
    folder.mkdir()
    for name in ("base", "a", "b"):
        (folder / name).symlink_to(family / name)
    return folder


def test_clearly_worse_trials_are_given_up(family: Path, tmp_path: Path) -> None:
    """At weights far beyond 1 the model is destroyed, which a share of the data shows."""
    document = config(family, {"baseline": False, "trials": 16, "sampler": "random", "seed": 1})
    document["models"][0]["parameters"]["weight"] = {"tune": [0.0, 40.0]}
    result = tune(document, tmp_path / "out", TuneOptions(model=False))
    pruned = [one for one in result.trials if one.outcome == "pruned"]
    whole = [one for one in result.trials if one.outcome == "complete"]
    assert pruned
    assert len(whole) >= 5
    assert min(one.gain for one in pruned if one.gain is not None) < (result.best.gain or 0)
    assert result.best in whole


def test_statistics_that_were_measured_anew_are_another_search(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    """Trials on the one would be compared with trials on the other."""
    stats = measure(family / "base", tmp_path / "stats")
    document = config(family, unpruned(trials=1, baseline=False))
    document |= {"merge_method": "aim", "parameters": {"activation_stats": str(stats)}}
    tune(document, tmp_path / "out", TuneOptions(model=False))
    shutil.rmtree(stats)
    measure(family / "base", stats, samples=2)
    with pytest.raises(InputError, match="holds another search: the statistics "):
        tune(document, tmp_path / "out", TuneOptions(model=False))


def test_a_baseline_that_was_not_tried_is_not_said_to_be_better(
    family: Path, tmp_path: Path
) -> None:
    notes: list[str] = []
    document = config(family, unpruned(trials=1, baseline=False))
    document["models"][0]["parameters"]["weight"] = {"tune": [-3.0, -2.0]}
    tune(document, tmp_path / "out", TuneOptions(model=False), say=notes.append)
    assert any("no trial is better than the base" in note for note in notes)
    assert not any("baseline" in note for note in notes)
