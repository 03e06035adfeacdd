"""The demo from start to end: text, base, two specialists, statistics, merges, losses.

The specialists learn from little text, several times over, as fine-tunes do: at the end they know
some of it by heart and have forgotten some of what the base knew. Whether a merge is better than
one with smaller weights is then a real question, and the weights of each method are tuned on text
that the table is not about.
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

import torch
from mergekit import merge_methods
from mergekit.options import MergeOptions
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_arm.demo.merges import (
    BASE,
    CALIBRATION,
    SPECIALTIES,
    TRIALS,
    measure,
    merge,
    merge_configs,
    merged_models,
    search,
    tune_configs,
    write_configs,
)
from mergekit_arm.demo.stream import DOMAIN as STREAMED
from mergekit_arm.demo.stream import EARLY, OUT, RUN, early_steps, run_stream
from mergekit_arm.demo.text import DOMAINS, DomainText, half, standard_library
from mergekit_arm.demo.train import new_model, save, token_blocks, train, train_tokenizer
from mergekit_arm.errors import Failure, InputError
from mergekit_arm.judging.judge import Judge
from mergekit_arm.judging.sets import HeldOutSet
from mergekit_arm.streaming.verdict import LOSS

BASE_DOMAIN = DOMAINS[0]
MARKER = "demo.json"
SCARCE = 48
"""Blocks of text that a specialist learns from."""

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
            _tune(bar)
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
    configs = merge_configs() | tune_configs()
    missing = {config["merge_method"] for config in configs.values()} - known
    if missing:
        raise Failure(
            f"mergekit does not know {', '.join(sorted(missing))}: install mergekit-arm with pip "
            "and unset MERGEKIT_ARM_AUTOLOAD"
        )


def _prepare(options: DemoOptions, texts: dict[str, DomainText]) -> None:
    out = options.out
    if out.exists():
        shutil.rmtree(out)
    for folder in ("training", "validation", "heldout"):
        (out / folder).mkdir(parents=True)
    (out / MARKER).write_text(json.dumps({"seed": options.seed}) + "\n")
    _write_texts(out / str(CALIBRATION.dataset), texts[BASE_DOMAIN].train)
    for domain, corpus in texts.items():
        # One half of each document to choose by, the other for the table.
        for number, folder in enumerate(("validation", "heldout")):
            halves = [half(document, number) for document in corpus.heldout]
            _write_texts(out / folder / f"{domain}.jsonl", [text for text in halves if text])
    with _inside(out):
        write_configs()


def _train_models(options: DemoOptions, texts: dict[str, DomainText], bar: Progress) -> None:
    tokenizer = train_tokenizer(text for domain in texts.values() for text in domain.train)

    def train_on(
        model: PreTrainedModel, name: str, blocks: Tensor, steps: int, learning_rate: float
    ) -> None:
        task = bar.add_task(f"training {name}", total=steps)
        train(
            model,
            tokenizer,
            blocks,
            steps=steps,
            learning_rate=learning_rate,
            seed=options.seed,
            folder=options.out / RUN if name == STREAMED else None,
            save_at=early_steps(steps) if name == STREAMED else (),
            on_step=lambda step: bar.update(task, completed=step),
        )
        save(model, tokenizer, options.out / name)

    base = new_model(len(tokenizer), seed=options.seed)
    plenty = token_blocks(tokenizer, texts[BASE_DOMAIN].train)
    train_on(base, BASE, plenty, options.base_steps, 4e-3)
    for domain in SPECIALTIES:
        blocks = token_blocks(tokenizer, texts[domain].train)
        generator = torch.Generator().manual_seed(options.seed)
        scarce = blocks[torch.randperm(len(blocks), generator=generator)[:SCARCE]]
        _write_texts(options.out / "training" / f"{domain}.jsonl", tokenizer.batch_decode(scarce))
        train_on(copy.deepcopy(base), domain, scarce, options.specialist_steps, 1e-3)


def _calibrate_and_merge(bar: Progress) -> None:
    task = bar.add_task("calibrating", total=None)
    measure(lambda done, total: bar.update(task, completed=done, total=total))
    for name in bar.track(merge_configs(), description="merging"):
        merge(name)


def _tune(bar: Progress) -> None:
    configs = tune_configs()
    task = bar.add_task("tuning", total=TRIALS * len(configs))
    for name in configs:
        search(name, lambda: bar.advance(task))


def _stream(bar: Progress) -> None:
    task = bar.add_task("streaming", total=len(EARLY))
    run_stream(lambda _record: bar.advance(task))
    bar.update(task, completed=len(EARLY))


def _measure(bar: Progress) -> LossTable:
    folders = {name: name for name in (BASE, *SPECIALTIES)}
    folders |= merged_models()
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
