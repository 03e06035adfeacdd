"""The demo from start to end: text, base, two specialists, statistics, merges, losses.

Calibration and merges run inside the output directory, on the relative paths that the printed
commands name, so that repeating a command by hand repeats what happened here.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from mergekit import merge_methods
from mergekit.options import MergeOptions
from mergekit.scripts.run_yaml import main as mergekit_yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from mergekit_arm.calibration.calibrate import calibrate
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.demo.stream import DOMAIN as STREAMED
from mergekit_arm.demo.stream import EARLY, OUT, RUN, early_steps, run_stream
from mergekit_arm.demo.text import DOMAINS, DomainText, standard_library
from mergekit_arm.demo.train import new_model, save, token_blocks, train, train_tokenizer
from mergekit_arm.errors import Failure, InputError
from mergekit_arm.judging.judge import Judge
from mergekit_arm.judging.sets import HeldOutSet
from mergekit_arm.streaming.verdict import LOSS

BASE_DOMAIN, *SPECIALTIES = DOMAINS
BASE = "base"
MARKER = "demo.json"
# With a leading ./ because mergekit asks the Hub about names that could be one of its models.
CALIBRATION = CalibrationOptions(
    model=f"./{BASE}", out="./stats", dataset="calibration.jsonl", samples=128, sequence_length=128
)

LossTable = dict[str, dict[str, float]]
"""Model → domain → held-out loss in nats per token."""


@dataclass(frozen=True)
class DemoOptions:
    """What ``mergekit-arm demo`` can be told; the amounts are for callers in a hurry."""

    out: Path
    seed: int = 42
    force: bool = False
    base_steps: int = 400
    specialist_steps: int = 120
    characters: int = 1_000_000


def merge_configs() -> dict[str, dict[str, Any]]:
    """Return the demo's merges by name, each a configuration for ``mergekit-yaml``."""
    aim = {"activation_stats": CALIBRATION.out, "omega": 0.4}
    return {
        "task_arithmetic": _config("task_arithmetic", {"weight": 1.0}),
        "task_arithmetic_0.7": _config("task_arithmetic", {"weight": 0.7}),
        "aim": _config("aim", {"weight": 1.0}, aim),
        "ties": _config("ties", {"weight": 1.0, "density": 0.5}),
        "aim_ties": _config("aim_ties", {"weight": 1.0, "density": 0.5}, aim),
    }


def run_demo(options: DemoOptions, console: Console | None = None) -> LossTable:
    """Run the whole demo into ``options.out`` and return its losses; shows progress on ``console``.

    Raises:
        InputError: the directory holds something that may not be replaced.
        Failure: this Python has no library sources, or mergekit does not know our methods.
    """
    console = console or Console(stderr=True)
    _check(options)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        reading = bar.add_task("reading the standard library", total=None)
        texts = standard_library(seed=options.seed, characters=options.characters)
        _prepare(options, texts)
        bar.update(reading, total=1, completed=1)
        _train_models(options, texts, bar)
        with _inside(options.out):
            _calibrate_and_merge(bar)
            _stream(bar)
            losses = _measure(bar)
            Path("losses.json").write_text(json.dumps(losses, indent=2) + "\n")
    return losses


def _check(options: DemoOptions) -> None:
    out = options.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: choose another directory with --out")
    if out.is_dir() and any(out.iterdir()):
        # Even --force deletes nothing but an earlier demo: a mistyped path costs nobody a model.
        if not (out / MARKER).is_file():
            raise InputError(f"{out} is not empty and no demo: choose another directory with --out")
        if not options.force:
            raise InputError(f"{out} exists: replace it with --force, or choose another --out")
    known = {method.spec.name for method in merge_methods.registered_methods()}
    missing = {config["merge_method"] for config in merge_configs().values()} - known
    if missing:
        raise Failure(
            f"mergekit does not know {', '.join(sorted(missing))}: install mergekit-arm with pip "
            "and unset MERGEKIT_ARM_AUTOLOAD"
        )


def _prepare(options: DemoOptions, texts: dict[str, DomainText]) -> None:
    out = options.out
    if out.exists():
        shutil.rmtree(out)
    for folder in ("configs", "heldout"):
        (out / folder).mkdir(parents=True)
    (out / MARKER).write_text(json.dumps({"seed": options.seed}) + "\n")
    _write_texts(out / str(CALIBRATION.dataset), texts[BASE_DOMAIN].train)
    for domain, corpus in texts.items():
        _write_texts(out / "heldout" / f"{domain}.jsonl", corpus.heldout)
    for name, config in merge_configs().items():
        (out / "configs" / f"{name}.yml").write_text(yaml.safe_dump(config, sort_keys=False))


def _train_models(options: DemoOptions, texts: dict[str, DomainText], bar: Progress) -> None:
    tokenizer = train_tokenizer(text for domain in texts.values() for text in domain.train)

    def train_on(
        model: PreTrainedModel, name: str, domain: str, steps: int, learning_rate: float
    ) -> None:
        task = bar.add_task(f"training {name}", total=steps)
        train(
            model,
            tokenizer,
            token_blocks(tokenizer, texts[domain].train),
            steps=steps,
            learning_rate=learning_rate,
            seed=options.seed,
            folder=options.out / RUN if name == STREAMED else None,
            save_at=early_steps(steps) if name == STREAMED else (),
            on_step=lambda step: bar.update(task, completed=step),
        )
        save(model, tokenizer, options.out / name)

    base = new_model(len(tokenizer), seed=options.seed)
    train_on(base, BASE, BASE_DOMAIN, options.base_steps, 4e-3)
    for domain in SPECIALTIES:
        train_on(copy.deepcopy(base), domain, domain, options.specialist_steps, 1e-3)


def _calibrate_and_merge(bar: Progress) -> None:
    task = bar.add_task("calibrating base", total=None)
    calibrate(CALIBRATION, lambda done, total: bar.update(task, completed=done, total=total))
    configs = merge_configs()
    for name in bar.track(configs, description="merging"):
        # The very command, without the seconds that a process takes to import torch again.
        arguments = [f"configs/{name}.yml", f"merged/{name}", "--quiet"]
        mergekit_yaml.main(arguments, standalone_mode=False)


def _stream(bar: Progress) -> None:
    task = bar.add_task("streaming", total=len(EARLY))
    run_stream(lambda _record: bar.advance(task))
    bar.update(task, completed=len(EARLY))


def _measure(bar: Progress) -> LossTable:
    folders = {name: name for name in (BASE, *SPECIALTIES)}
    folders |= {name: f"merged/{name}" for name in merge_configs()}
    folders["stream of checkpoints"] = str(OUT / "model")
    judges = {domain: _judge(domain) for domain in DOMAINS}
    losses: LossTable = {}
    for name in bar.track(folders, description="measuring losses"):
        losses[name] = {}
        for domain, judge in judges.items():
            losses[name][domain] = judge.score(f"./{folders[name]}", Path())[LOSS]
    return losses


def _judge(domain: str) -> Judge:
    """Return what a stream would judge by: all of the domain's held-out text."""
    # Few enough logits in a batch to reuse their memory: faults cost as much.
    data = {"dataset": f"heldout/{domain}.jsonl", "samples": 1_000_000, "batch_size": 16}
    heldout = HeldOutSet.model_validate({**data, "sequence_length": 128})
    return Judge({LOSS: heldout}, [CALIBRATION.model], MergeOptions(), "cpu", "float32")


def _config(
    method: str, per_model: dict[str, float], shared: dict[str, Any] | None = None
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "merge_method": method,
        "base_model": CALIBRATION.model,
        "models": [{"model": f"./{name}", "parameters": dict(per_model)} for name in SPECIALTIES],
        "dtype": "float32",
    }
    return config | ({"parameters": dict(shared)} if shared else {})


def _write_texts(file: Path, texts: list[str]) -> None:
    rows = (json.dumps({"text": text}) + "\n" for text in texts)
    file.write_text("".join(rows), encoding="utf-8")


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """Work inside ``folder``; contextlib.chdir exists only from Python 3.11 on."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
