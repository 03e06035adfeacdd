"""Directories of all four kinds, made by the commands that write them, and pages taken apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import yaml
from mergekit.scripts.run_yaml import main as mergekit_yaml

from mergekit_arm.streaming import StreamOptions, stream
from mergekit_arm.streaming.state import (
    Attempt,
    MergedCheckpoint,
    Skipped,
    State,
    StepRecord,
)
from mergekit_arm.tuning import TuneOptions, tune
from mergekit_arm.tuning.report.files import trials_text
from mergekit_arm.tuning.state import TuneState
from mergekit_arm.tuning.trials import TrialRecord
from tests.support import streams, tuning
from tests.support.merges import config, run

EVIL = "<script>alert(1)</script><b>bold</b><img src=x onerror=alert(2)><a href='http://a.b'>&amp;"


def merge(family: Path, folder: Path, **changes: object) -> Path:
    """Merge as mergekit's command does, with its configuration beside the model."""
    return run(mergekit_yaml, yaml.safe_dump(config(family, **changes)), folder)


def run_stream(folder: Path) -> Path:
    """Run a stream of three steps, judged on held-out tokens."""
    streams.write_run(folder)
    held = {"held": {"dataset": str(streams.write_tokens(folder / "held.jsonl", 7))}}
    document = streams.config(folder, evaluation=held)
    stream(document, folder / "out", StreamOptions())
    return folder / "out"


def run_tune(folder: Path) -> Path:
    """Search one weight on two sets."""
    tuning.write_family(folder)
    sets = {name: {"dataset": str(folder / f"{name}.jsonl")} for name in ("one", "two")}
    document = tuning.config(
        folder, {"evaluation": sets, "trials": 3, "pruning": False, "baseline": False}
    )
    tune(document, folder / "out", TuneOptions(model=False))
    return folder / "out"


def evil_state() -> State:
    """Return a stream whose every name is markup, with rotations."""
    steps = [
        StepRecord(
            step=number,
            position=number - 1,
            passed=1,
            checkpoint=EVIL,
            merged=[MergedCheckpoint(name=EVIL, reference=EVIL, content=None, scores={EVIL: 3.0})],
            learning_rate=0.5 / number,
            planned=0.5,
            tried=[Attempt(rates=None, scores={EVIL: 2.0}, bytes=1)],
            accepted=True,
            statistics_from=None,
            calibration_tokens=0,
            rotation_degrees={"mean": 10.0 * number, "max": 20.0 * number},
            update_norm=1.0 / number,
            task_norm=2.0 / number,
            current={EVIL: 3.0 - number},
            base={EVIL: 3.0},
            best_step=number,
            seconds={},
            bytes=1,
        )
        for number in (1, 2)
    ]
    return State(
        fingerprint={},
        data={EVIL: {"tokens": 10, "sha256": EVIL}},
        base={EVIL: 3.0},
        steps=steps,
        skipped=[Skipped(position=2, checkpoint=EVIL, reason=EVIL)],
        stopped=EVIL,
    )


def write_evil_search(out: Path) -> Path:
    """Write what a search leaves, with markup in every name, and one trial of each outcome."""
    out.mkdir()
    state = TuneState(fingerprint={}, scores={EVIL: {EVIL: 3.0}})
    state.save(out)
    trials = [
        TrialRecord(
            study=study,
            number=number,
            outcome=outcome,
            method=method,
            values={EVIL: value, f"rank {EVIL}": EVIL},
            gain=gain,
            gains={} if gain is None else {EVIL: gain, "other": 1 - gain},
            scores={} if gain is None else {EVIL: 3 - gain, "other": 2 + gain},
            reason=EVIL if outcome == "failed" else None,
        )
        for study, number, outcome, method, value, gain in (
            ("baseline", 0, "complete", "task_arithmetic", 0.5, 0.6),
            ("tune", 0, "complete", "ties", 0.1, 0.2),
            ("tune", 1, "pruned", "ties", 0.9, -0.5),
            ("tune", 2, "failed", EVIL, 0.3, None),
            ("tune", 3, "complete", EVIL, 0.4, 0.9),
            ("tune", 4, "complete", "ties", 0.6, 0.4),
        )
    ]
    (out / "trials.jsonl").write_text(trials_text(trials))
    return out


@dataclass
class Parsed(HTMLParser):
    """A page, taken apart."""

    text: str
    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    shown: list[str] = field(default_factory=list)
    """Texts outside scripts and styles."""
    scripts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        inside = self.tags[-1][0] if self.tags else ""
        if inside == "script" and self.cdata_elem == "script":
            self.scripts.append(data)
        elif inside != "style":
            self.shown.append(data)

    def titles(self) -> list[str]:
        """Return the names of the figures."""
        return [str(a["data-figure"]) for tag, a in self.tags if "data-figure" in a]
