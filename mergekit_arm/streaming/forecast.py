"""The dry run: everything that is known of a stream, and everything that is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergekit_arm.errors import InputError
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.estimate import Estimate, estimate
from mergekit_arm.streaming.plan import Plan, make_plan
from mergekit_arm.streaming.preflight import data_problems, make_judge
from mergekit_arm.streaming.run import StreamOptions, complete_options, keep_problems
from mergekit_arm.streaming.state import open_state, read_state


@dataclass(frozen=True)
class Forecast:
    """What ``--dry-run`` prints."""

    plan: Plan | None
    """None where too little of the configuration holds together."""
    estimate: Estimate | None
    done: int
    """Steps that ``OUT`` holds already."""
    problems: list[str]


def forecast(config: StreamConfig, out: Path, options: StreamOptions) -> Forecast:
    """Check a stream and forecast what it takes. Writes nothing but a small temporary file."""
    merge = complete_options(options.merge, out)
    plan, problems = make_plan(config, merge, options.watch)
    problems += keep_problems(plan, options.keep)
    done = 0
    try:
        if plan is not None and read_state(out) is not None:
            done = len(open_state(out, plan.fingerprint).steps)
    except InputError as error:
        problems.append(error.message)
    if plan is None:
        return Forecast(None, None, done, problems)
    problems += data_problems(plan, make_judge(plan, merge), merge)
    costs = None
    if not problems:
        try:
            costs = estimate(plan, out, merge, options.keep)
            problems += costs.problems()
        except InputError as error:
            problems.append(error.message)
    return Forecast(plan, costs, done, problems)
