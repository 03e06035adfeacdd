"""Which parameters matter: known where one alone decides."""

from __future__ import annotations

import gc
from pathlib import Path

import optuna
import pytest
from matplotlib.figure import Figure

from mergekit_arm.tuning.report.plot import draw_tuning, importances
from mergekit_arm.tuning.trials import TrialRecord

optuna.logging.set_verbosity(optuna.logging.WARNING)


def study(trials: int, objectives: int) -> optuna.Study:
    found = optuna.create_study(
        directions=["maximize"] * objectives, sampler=optuna.samplers.RandomSampler(seed=0)
    )

    def gains(trial: optuna.Trial) -> list[float]:
        decisive = trial.suggest_float("decisive", 0, 1)
        trial.suggest_float("idle", 0, 1)
        return [decisive] * objectives

    found.optimize(gains, n_trials=trials)
    return found


@pytest.mark.parametrize("objectives", [1, 2])
def test_what_decides_matters_most(objectives: int) -> None:
    found = importances(study(60, objectives))
    assert list(found) == ["decisive", "idle"]
    assert found["decisive"] > 0.9


def test_few_trials_tell_nothing() -> None:
    assert importances(study(4, 1)) == {}


def test_a_drawn_figure_is_freed_at_once(tmp_path: Path) -> None:
    """A search draws twice a minute for days, and Python looks at all objects much less often."""
    found = [
        TrialRecord(
            study="tune",
            number=n,
            outcome="complete",
            method="m",
            values={"w": n},
            gain=n,
            gains={},
        )
        for n in range(3)
    ]
    gc.collect()
    draw_tuning(found, {"w": 1.0}, tmp_path / "tune.png")
    assert gc.isenabled()
    assert (tmp_path / "tune.png").read_bytes().startswith(b"\x89PNG")
    assert not any(type(one) is Figure for one in gc.get_objects())
