"""Which parameters matter: known where one alone decides."""

from __future__ import annotations

import optuna
import pytest

from mergekit_arm.tuning.report.plot import importances

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
