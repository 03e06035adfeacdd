"""The search, as the library offers it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mergekit.options import MergeOptions

from mergekit_arm.errors import InputError
from mergekit_arm.files import remove
from mergekit_arm.merging.merge import forgetting
from mergekit_arm.merging.options import LORA_CACHE, complete_options
from mergekit_arm.models.references import plain_path
from mergekit_arm.tuning.config import load_tuning
from mergekit_arm.tuning.layout import (
    BEST,
    METRIC_LOG,
    MODEL,
    PLOT,
    STATE_FILE,
    TRIALS,
    WORK,
    check_out,
)
from mergekit_arm.tuning.measuring import Told
from mergekit_arm.tuning.options import TuneOptions
from mergekit_arm.tuning.plan import TunePlan, has_tokenizer, make_tune_plan
from mergekit_arm.tuning.results import TuneResult
from mergekit_arm.tuning.run import OnTrial, Run
from mergekit_arm.tuning.search import STUDY_FILE
from mergekit_arm.tuning.state import open_tune_state

_MASKS = 42
"""The seed of random masks, where ``--random-seed`` says none: whatever the sampler's may be, a
search that goes on merges as it did before."""


def tune(
    config: Mapping[str, Any] | str | Path,
    out: str | Path,
    options: TuneOptions | None = None,
    *,
    say: Callable[[str], None] | None = None,
    tell: Told | None = None,
    on_trial: OnTrial | None = None,
) -> TuneResult:
    """Search the numbers of a merge, and leave the best of them in ``out``.

    A search that was interrupted goes on where it was; several processes with the same arguments
    share one. A finished one returns its result again, or goes on where more trials are asked
    for. Holds one model for scoring and, where memory allows, the tensors of all inputs.

    Args:
        config: the YAML file, or its content.
        out: a new directory, or that of the same search.
        options: mergekit's options, and what holds instead of the file's settings.
        say: receives one-line notes for the user.
        tell: called while models are scored, with a name, scored tokens so far and in all.
        on_trial: called with every trial of this process that has ended, and of its study: the
            best so far, how many have ended, and how many there will be.

    Raises:
        InputError: something in ``config`` or what it names is wrong, or ``out`` holds another
            search; found before the first merge wherever it can be.
        Failure: trials or the user's command failed; run again to continue.
    """
    options = options or TuneOptions()
    say = say or (lambda note: None)
    place = Path(plain_path(out))
    plan, merge = plan_tuning(config, place, options)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{place} cannot be made: {error.strerror}; give another OUT") from error
    if options.force:
        _remove_search(place)
    for note in plan.notes:
        say(note)
    for judge in filter(None, (plan.judge, plan.test)):
        judge.log = place / METRIC_LOG
        judge.say = say if merge.verbosity else None
    with forgetting(plan.references, []):
        run = Run(
            place,
            plan,
            merge,
            say,
            tell or (lambda name, done, total: None),
            on_trial or (lambda trial, best, done, budget: None),
        )
        return run.complete(with_model=options.model)


def plan_tuning(
    config: Mapping[str, Any] | str | Path, out: str | Path, options: TuneOptions | None = None
) -> tuple[TunePlan, MergeOptions]:
    """Check a search, and what ``out`` holds; return it with mergekit's options for its merges.

    Writes nothing.

    Raises:
        InputError: the first thing that is wrong.
    """
    out, options = Path(plain_path(out)), options or TuneOptions()
    read = load_tuning(config)
    settings = options.settings(read.settings)
    there = check_out(out)
    seed = options.merge.random_seed
    copies = options.merge.copy_tokenizer and has_tokenizer(read.space.document, options.merge)
    merge = complete_options(options.merge, out).model_copy(
        update={
            "random_seed": _MASKS if seed is None else seed,
            "copy_tokenizer": copies,
        }
    )
    plan = make_tune_plan(read, settings, merge)
    if there and not options.force:
        open_tune_state(out, plan.fingerprint)  # refuses another search
    return plan, merge


def _remove_search(out: Path) -> None:
    """Remove an earlier search, and nothing else that lies beside it."""
    names = [BEST, MODEL, TRIALS, PLOT, METRIC_LOG, STUDY_FILE, LORA_CACHE, STATE_FILE]
    names += [f"{STUDY_FILE}-wal", f"{STUDY_FILE}-shm"]
    if check_out(out):
        for path in [out / name for name in names] + list(out.glob(f"{WORK}.*")):
            remove(path)
