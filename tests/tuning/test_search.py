"""The study: points asked for first, budgets, dead processes, and a grid."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import optuna
import pytest

from mergekit_arm.errors import InputError
from mergekit_arm.tuning.grid import grid
from mergekit_arm.tuning.search import Candidates, Search, open_storage
from mergekit_arm.tuning.space import Domain
from tests.support import forks

TWO = Candidates(
    {"ties": {"w": Domain(0, 1)}, "slerp": {"t": Domain(0, 1), "n": Domain(1, 3, integer=True)}}
)
ONE = Candidates({"ties": {"w": Domain(0, 1), "m": Domain(choices=("x", "y"))}})


def run_through(search: Search, budget: int) -> list[tuple[str, dict[str, object]]]:
    found = []
    while (taken := search.take(budget)) is not None:
        found.append((taken.method, dict(taken.values)))
        value = taken.values.get("w", taken.values.get("t"))
        assert isinstance(value, float)
        search.tell(taken, [-((value - 0.3) ** 2)], {"gain": value})
    return found


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_what_is_asked_for_comes_first_and_the_budget_last(tmp_path: Path, sampler: str) -> None:
    search = Search(tmp_path, "tune", TWO, sampler=sampler)  # type: ignore[arg-type]
    asked = [("slerp", {"t": 0.25, "n": 2}), ("ties", {"w": 0.5})]
    for _ in range(3):
        search.enqueue(asked)
    found = run_through(search, 12)
    assert len(found) == 12
    assert found[:2] == asked
    assert {method for method, _ in found} == {"ties", "slerp"}
    assert all(
        set(values) == ({"w"} if method == "ties" else {"t", "n"}) for method, values in found
    )
    assert len({str(one) for one in found}) == 12
    assert [search.point_of(trial) for trial in search.trials()] == found


def test_a_search_that_is_opened_again_goes_on_alike(tmp_path: Path) -> None:
    whole = run_through(Search(tmp_path, "whole", ONE, seed=3), 14)
    begun = run_through(Search(tmp_path, "parts", ONE, seed=3), 6)
    rest = run_through(Search(tmp_path, "parts", ONE, seed=3), 14)
    assert begun + rest == whole
    other = run_through(Search(tmp_path, "other", ONE, seed=4), 14)
    assert other != whole


def test_a_failed_trial_uses_the_budget_and_says_why(tmp_path: Path) -> None:
    search = Search(tmp_path, "tune", ONE)
    taken = search.take(1)
    assert taken is not None
    search.fail(taken, "because")
    assert search.take(1) is None
    (trial,) = search.trials()
    assert trial.user_attrs["reason"] == "because"


def take_two_and_die(folder: Path) -> None:
    search = Search(folder, "tune", ONE, seed=1)
    taken = [search.take(3) for _ in range(2)]
    print([dict(one.values) for one in taken if one], flush=True)  # noqa: T201
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_dead_process_had_is_taken_again(tmp_path: Path) -> None:
    search = Search(tmp_path, "tune", ONE, seed=1)
    search.enqueue([("ties", {"w": 0.125, "m": "y"})])
    died = forks.Running(take_two_and_die, tmp_path).end()
    assert died.returncode == -9, died.stderr
    values = eval(died.stdout)
    found = run_through(search, 3)
    assert [one for _, one in found[:2]] == values
    assert len(found) == 3
    assert len(search.trials()) == 3  # those that were put back are not counted


def test_what_a_living_process_has_is_left_to_it(tmp_path: Path) -> None:
    search = Search(tmp_path, "tune", ONE)
    taken = search.take(2)
    other = Search(tmp_path, "tune", ONE)
    assert len(run_through(other, 2)) == 1
    assert taken is not None
    search.put_back(taken)
    assert len(run_through(other, 2)) == 1


def test_waiting_ends_with_the_last_trial(tmp_path: Path) -> None:
    search = Search(tmp_path, "tune", ONE)
    taken = search.take(1)
    assert taken is not None
    timer = threading.Timer(1.0, lambda: search.tell(taken, [1.0], {}))
    timer.start()
    Search(tmp_path, "tune", ONE).wait()
    timer.join()
    assert search.trials()[0].state == optuna.trial.TrialState.COMPLETE


def test_cmaes_searches_ranges(tmp_path: Path) -> None:
    candidates = Candidates({"ties": {"w": Domain(0, 1), "d": Domain(0.1, 1, log=True)}})
    search = Search(tmp_path, "tune", candidates, sampler="cmaes")
    found = run_through(search, 40)
    later = [abs(float(str(values["w"])) - 0.3) for _, values in found[25:]]
    assert sum(later) / len(later) < 0.15


def test_a_grid_is_the_finest_that_fits() -> None:
    points = grid(TWO, 14)
    ties = [values["w"] for method, values in points if method == "ties"]
    assert ties == [0.0, 0.5, 1.0]
    assert sum(method == "slerp" for method, _ in points) == 9
    assert len(grid(ONE, 7)) == 6
    assert len(grid(Candidates({"x": {"n": Domain(1, 3, integer=True)}}), 50)) == 3
    with pytest.raises(InputError, match="has 6 points: raise trials"):
        grid(TWO, 5)


def test_a_file_of_something_else_is_no_study(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("text" * 1000)
    with pytest.raises(InputError, match="is no study"):
        open_storage(tmp_path)
    assert os.listdir(tmp_path) == ["study.db"]


def test_a_grid_that_grows_is_tried_to_its_end(tmp_path: Path) -> None:
    """However many trials there were before it."""
    one = Candidates({"ties": {"w": Domain(0, 1)}})
    for points in (4, 6):
        search = Search(tmp_path, "tune", one, sampler="grid")
        asked = grid(one, points)
        search.enqueue(asked)
        found = run_through(search, len(asked))
    assert [values["w"] for _, values in found] == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_what_a_machine_of_another_name_had_begun_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that is started again has another name, and nothing of the first lives on."""
    search = Search(tmp_path, "tune", ONE)
    with monkeypatch.context() as patch:
        patch.setattr("platform.node", lambda: "pod-1")
        first = search.take(1)
    assert first is not None
    again = Search(tmp_path, "tune", ONE)
    second = again.take(1)
    assert second is not None
    assert second.values == first.values
    again.tell(second, [0.0], {})
    again.wait()
