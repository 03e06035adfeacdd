"""The search: an Optuna study in a file, which several processes may share and any may leave.

A trial is taken under a lock: what dead processes left is put back first, and a new one is begun
only while the budget lasts. The lock is not held while a trial is worked on.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, CmaEsSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from mergekit_arm.errors import Failure, InputError, first_line
from mergekit_arm.tuning.config import Sampler
from mergekit_arm.tuning.space import METHOD, Domain, Value

STUDY_FILE = "study.db"
LOCK_FILE = ".lock"
_OWNER, _RETURNED, _REASON = "process", "put back", "reason"
_POLL = 0.5  # seconds between looks at what other processes do


@dataclass(frozen=True)
class Candidates:
    """What may be tried: for every method its own unknowns, by name."""

    methods: Mapping[str, Mapping[str, Domain]]

    def suggest(self, trial: Trial) -> tuple[str, dict[str, Value]]:
        """Return a trial's method, and the value of each of its unknowns."""
        first = next(iter(self.methods))
        method = first
        if len(self.methods) > 1:
            method = str(trial.suggest_categorical(METHOD, list(self.methods)))
        return method, {
            name: _suggest(trial, self.label(method, name), domain)
            for name, domain in self.methods[method].items()
        }

    def label(self, method: str, name: str) -> str:
        """Return what the study calls an unknown: each method has its own."""
        return f"{method}: {name}" if len(self.methods) > 1 else name

    def point(self, method: str, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return the study's parameters for these values."""
        found = {self.label(method, name): value for name, value in values.items()}
        return {METHOD: method, **found} if len(self.methods) > 1 else found


@dataclass(frozen=True)
class Taken:
    """A trial that this process works on."""

    trial: Trial
    method: str
    values: Mapping[str, Value]

    @property
    def number(self) -> int:
        """From 0, in the order of the study."""
        return int(self.trial.number)


class Search:
    """One study in the file of a directory."""

    def __init__(
        self,
        out: Path,
        name: str,
        candidates: Candidates,
        *,
        objectives: int = 1,
        sampler: Sampler = "tpe",
        seed: int = 42,
        pruning: bool = False,
    ) -> None:
        """Open the study ``name`` in ``out``, or begin it. All objectives are maximised."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._lock = FileLock(out / LOCK_FILE)
        self._candidates = candidates
        with self._lock:
            self._storage = open_storage(out)
            self.study = optuna.create_study(
                storage=self._storage,
                study_name=name,
                directions=["maximize"] * objectives,
                load_if_exists=True,
                pruner=_pruner(pruning),
            )
            self._id = self._storage.get_study_id_from_name(name)
        self._sampler, self._seed = sampler, seed

    def enqueue(self, points: Sequence[tuple[str, Mapping[str, Value]]]) -> None:
        """Let these points be tried first, each once however often this is called."""
        with self._lock:
            for method, values in points:
                point = self._candidates.point(method, values)
                if not any(_asked(trial) == point for trial in self._trials()):
                    self.study.enqueue_trial(point)

    def take(self, budget: int) -> Taken | None:
        """Begin a trial, unless ``budget`` trials are done or begun, or all points of a grid."""
        with self._lock:
            self._put_back()
            waiting = any(trial.state == TrialState.WAITING for trial in self._trials())
            over = sum(_counts(trial) for trial in self._trials()) >= budget
            # A grid's points are all enqueued, beside what was tried before there was this grid.
            if not waiting if self._sampler == "grid" else over:
                return None
            # A seed for each trial: other processes, and a resume, would draw the same otherwise.
            seed = _seed_of(self._seed, len(self._trials()))
            self.study.sampler = _sampler(self._sampler, seed, len(self._candidates.methods) > 1)
            trial = self.study.ask()
            trial.set_user_attr(_OWNER, _this_process())
            method, values = self._candidates.suggest(trial)
        return Taken(trial, method, values)

    def wait(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Wait for trials that other processes work on; those of dead ones are put back."""
        while not interrupted():
            with self._lock:
                self._put_back()
            if not any(trial.state == TrialState.RUNNING for trial in self._trials()):
                return
            time.sleep(_POLL)

    def tell(self, taken: Taken, values: Sequence[float], facts: Mapping[str, Any]) -> None:
        """End a trial with its objectives, and what else is to be known of it."""
        self._note(taken, facts)
        self.study.tell(taken.trial, list(values))

    def prune(self, taken: Taken, facts: Mapping[str, Any]) -> None:
        """End a trial that was not worth its time."""
        self._note(taken, facts)
        self.study.tell(taken.trial, state=TrialState.PRUNED)

    def fail(self, taken: Taken, reason: str) -> None:
        """End a trial that has no result."""
        self._note(taken, {_REASON: reason})
        self.study.tell(taken.trial, state=TrialState.FAIL)

    def put_back(self, taken: Taken) -> None:
        """Let a trial that this process does not finish be taken again."""
        with self._lock:
            trial = self._trials()[taken.number]
            if trial.state == TrialState.RUNNING:
                self._return(trial)

    def trials(self) -> list[FrozenTrial]:
        """Return all trials that were not put back."""
        return [trial for trial in self._trials() if not trial.user_attrs.get(_RETURNED)]

    def point_of(self, trial: FrozenTrial) -> tuple[str, dict[str, Value]]:
        """Return a trial's method, and the value of each of its unknowns."""
        method = str(trial.params.get(METHOD, next(iter(self._candidates.methods))))
        return method, {
            name: trial.params[self._candidates.label(method, name)]
            for name in self._candidates.methods[method]
            if self._candidates.label(method, name) in trial.params
        }

    def _trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def _note(self, taken: Taken, facts: Mapping[str, Any]) -> None:
        for key, value in facts.items():
            taken.trial.set_user_attr(key, value)

    def _put_back(self) -> None:
        """Let what dead processes were working on be taken again."""
        for trial in self._trials():
            if trial.state == TrialState.RUNNING and not _alive(trial.user_attrs.get(_OWNER)):
                self._return(trial)

    def _return(self, trial: FrozenTrial) -> None:
        number = self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
        self._storage.set_trial_user_attr(number, _RETURNED, True)
        self.study.tell(trial.number, state=TrialState.FAIL)
        if point := _asked(trial):
            self.study.enqueue_trial(point)


def reason_of(trial: FrozenTrial) -> str | None:
    """Return why a trial failed; None where it did not."""
    reason = trial.user_attrs.get(_REASON)
    return None if reason is None else str(reason)


def open_storage(out: Path) -> RDBStorage:
    """Open the file of studies in ``out``, which it is made for if need be.

    Raises:
        InputError: it is no such file.
        Failure: the disk is full, or cannot be written.
    """
    path = out / STUDY_FILE
    try:
        with closing(sqlite3.connect(path, timeout=60)) as connection:
            # Readers such as Optuna's dashboard do not wait for writers.
            connection.execute("PRAGMA journal_mode=WAL")
        return RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})
    except sqlite3.OperationalError as error:
        raise Failure(
            f"{path} cannot be written ({first_line(error)}); make room and run it again"
        ) from error
    except (sqlite3.DatabaseError, RuntimeError) as error:
        raise InputError(f"{path} is no study ({error}); give another OUT, or --force") from error


def _suggest(trial: Trial, name: str, domain: Domain) -> Value:
    if domain.choices:
        found = trial.suggest_categorical(name, list(domain.choices))
        assert found is not None  # none of the choices is
        return found
    if domain.integer:
        return trial.suggest_int(name, round(domain.low), round(domain.high), log=domain.log)
    return trial.suggest_float(name, domain.low, domain.high, log=domain.log)


def _sampler(name: Sampler, seed: int, conditional: bool) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name == "cmaes":
            return CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if name == "tpe":
            # Trials of different methods have different unknowns: each group has its own model.
            return TPESampler(seed=seed, multivariate=True, group=conditional, constant_liar=True)
        return RandomSampler(seed=seed)  # a grid's points are all enqueued


def _seed_of(search: int, trial: int) -> int:
    """Return a trial's seed: those of two searches have nothing in common, be theirs neighbours."""
    return int(np.random.SeedSequence([search, trial]).generate_state(1)[0])


def _pruner(pruning: bool) -> BasePruner:
    return MedianPruner(n_startup_trials=5) if pruning else NopPruner()


def _counts(trial: FrozenTrial) -> bool:
    """Say whether a trial has used, or uses, a part of the budget."""
    return trial.state != TrialState.WAITING and not trial.user_attrs.get(_RETURNED)


def _asked(trial: FrozenTrial) -> dict[str, Any]:
    """Return the point that a trial has, or that it was enqueued with."""
    return dict(trial.system_attrs.get("fixed_params") or trial.params)


def _this_process() -> list[Any]:
    return [platform.node(), os.getpid(), psutil.Process().create_time()]


def _alive(owner: Any) -> bool:
    """Say whether the process that began a trial may still work on it."""
    if not owner:
        return False  # taken and written down under one lock
    host, pid, created = owner
    if host != platform.node():
        return False  # searches are shared on one machine, which has been started again since
    try:
        return bool(psutil.Process(pid).create_time() == created) and (
            psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        )
    except psutil.NoSuchProcess:
        return False
