"""One training run, a task and a seed: its data, its checkpoints, and statistics of its base."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mergekit_arm.calibration.calibrate import calibrate
from mergekit_arm.calibration.options import CalibrationOptions
from tests.evidence.bases import base_folder, load, load_tokenizer, weights_digest
from tests.evidence.encoding import Encoded, encode
from tests.evidence.general import TEXTS, digest, judging_blocks
from tests.evidence.sizes import Size
from tests.evidence.tasks import Example, examples
from tests.evidence.training import train
from tests.evidence.variants import (
    CHANGES,
    data_free_moments,
    even_importance,
    permuted_importance,
    random_subspace,
)

State = dict[str, Tensor]


class Base:
    """The model that all runs of a size start from, and what is measured on it once."""

    def __init__(self, size: Size, work: Path) -> None:
        self.size = size
        self.work = work / size.name
        self.work.mkdir(parents=True, exist_ok=True)
        self._keeps: tuple[object, dict[str, State]] = (None, {})

    @cached_property
    def model(self) -> PreTrainedModel:
        """What weights are put into to be judged."""
        return load(self.folder, self.size.device)

    def kept(self, owner: object) -> dict[str, State]:
        """Return what is held in memory for a run or a group; what another one kept is let go."""
        if self._keeps[0] is not owner:
            self._keeps = (owner, {})
        return self._keeps[1]

    @cached_property
    def folder(self) -> Path:
        """The base's directory."""
        return base_folder(self.size, self.work)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return load_tokenizer(self.folder)

    @cached_property
    def general(self) -> list[list[int]]:
        """Blocks of general text to judge by."""
        return judging_blocks(self.tokenizer, self.size)

    def state(self) -> State:
        """Return the base's weights."""
        return states(self.folder)

    def statistics(self, which: str) -> Path:
        """Return the base's statistics on one of ``TEXTS``, or one of ``VARIANTS`` of these.

        ``general-512`` are on about 512 tokens of it; ``general~16`` are changed by ``CHANGES``.
        """
        out = self.work / f"statistics-{which}"
        source, _, change = which.partition("~")
        if change:
            return made(out, lambda: CHANGES[change](self.statistics(source), out))
        if which in VARIANTS:
            return made(out, lambda: VARIANTS[which](self.statistics("general"), out))
        text, _, tokens = which.partition("-")
        return made(out, lambda: self.measure_text(text, self.folder, out, int(tokens or 0)))

    def measure_text(self, text: str, model: Path, out: Path, tokens: int = 0) -> None:
        """Measure ``model`` on about so many tokens of a text, or as many as the size has."""
        blocks = -(-tokens // self.size.block) or self.size.general["calibration"]
        self.measure(list(TEXTS[text]()), model, out, blocks=blocks)

    def measure(self, texts: list[str], model: Path, out: Path, *, blocks: int = 0) -> None:
        """Measure ``model`` on ``blocks`` of the texts in a row; on a block for each text if 0."""
        data, join = out.with_suffix(".jsonl"), blocks > 0
        length = self.size.block
        if join:
            rows = [{"text": text} for text in texts]
        else:
            rows = [{"input_ids": self.tokenizer(t)["input_ids"][:length]} for t in texts]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        calibrate(
            CalibrationOptions(
                model=str(model),
                tokenizer=str(self.folder) if join else None,
                out=str(out),
                dataset=str(data),
                samples=blocks or len(texts),
                sequence_length=length,
                device=self.size.device,
                dtype="float32",
                quiet=True,
            )
        )


VARIANTS = {
    "random": random_subspace,
    "permuted": permuted_importance,
    "even": even_importance,
}
"""What is made of the base's statistics on general text."""


class Run:
    """A fine-tune of the base on one task with one seed."""

    def __init__(self, base: Base, task: str, seed: int) -> None:
        self.base, self.task, self.seed = base, task, seed
        self.folder = base.work / f"{task}-{seed}"
        self.folder.mkdir(exist_ok=True)

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        """The task's splits."""
        return examples(self.task, self.seed, self.base.size)

    @cached_property
    def encoded(self) -> dict[str, list[Encoded]]:
        """The same as token ids."""
        return {split: encode(self.base.tokenizer, some) for split, some in self.examples.items()}

    def checkpoint(self, fraction: float) -> Path:
        """Return the checkpoint after this part of the run, training it (again) if it is gone."""
        out = self.folder / "run" / f"checkpoint-{self.base.size.step(fraction)}"
        self._train(unless=out / "model.safetensors")
        return out

    @property
    def _log(self) -> Path:
        return self.folder / "losses.json"

    def train(self) -> dict[str, Any]:
        """Return every step's loss, and the seconds, of the run that left the checkpoints here."""
        self._train(unless=self._log)
        found: dict[str, Any] = json.loads(self._log.read_text())
        return found

    def _train(self, *, unless: Path) -> None:
        """Train, unless a run that came to its end left this file."""
        size = self.base.size
        with FileLock(self.folder / "lock"):
            if self._log.is_file() and unless.is_file():
                return
            self._log.unlink(missing_ok=True)
            wall, processor = time.perf_counter(), time.process_time()
            model = load(self.base.folder, size.device)
            data, out = self.encoded["training"], self.folder / "run"
            losses = train(model, data, size, seed=self.seed, folder=out)
            spent = {
                "training_seconds": round(time.perf_counter() - wall, 1),
                "training_processor_seconds": round(time.process_time() - processor, 1),
            }
            self._log.write_text(json.dumps({"step_losses": losses, **spent}))

    def statistics(self, which: str) -> Path:
        """Return statistics of the base or, for ``own`` …, of the converged specialist.

        ``task`` and ``own`` are on the training examples, answers included, ``own-general`` on
        general text, and ``own-free`` on no data: what the specialist's weights say of its inputs.
        The others are the base's on general text. A change may follow, as in ``task~16``.
        """
        out = self.folder / f"statistics-{which}"
        source, _, change = which.partition("~")
        if change and source in ("task", "own"):
            return made(out, lambda: CHANGES[change](self.statistics(source), out))
        if which == "own-general":
            return made(out, lambda: self.base.measure_text("general", self.checkpoint(1.0), out))
        if which == "own-free":
            source = self.statistics("own")
            weights = states(self.checkpoint(1.0)), self.base.state()
            return made(out, lambda: data_free_moments(source, out, *weights))
        if which in ("task", "own"):
            model = self.base.folder if which == "task" else self.checkpoint(1.0)
            return made(out, lambda: self.base.measure(self.texts(), model, out))
        return self.base.statistics(which)

    def texts(self) -> list[str]:
        """Return the training examples, answers included."""
        return [one.prompt + one.answer for one in self.examples["training"]]

    def data_digest(self) -> str:
        """Return a short name of all that this run learns and is judged by."""
        return digest([self.examples, self.base.general, weights_digest(self.base.folder)])


def states(folder: Path) -> State:
    """Return the weights of a directory's model, in float32."""
    found: State = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return {name: tensor.float() for name, tensor in found.items()}


def made(out: Path, make: Callable[[], None]) -> Path:
    """Return ``out``, calling ``make`` if it does not exist; one process at a time."""
    with FileLock(out.with_suffix(".lock")):
        if not out.is_dir():
            make()
    return out


def average(states: list[State], weights: list[float]) -> State:
    """Return the weighted mean of models."""
    whole = sum(weights)
    mean = {name: torch.zeros_like(tensor) for name, tensor in states[0].items()}
    for state, weight in zip(states, weights, strict=True):
        for name, tensor in state.items():
            mean[name].add_(tensor, alpha=weight / whole)
    return mean
