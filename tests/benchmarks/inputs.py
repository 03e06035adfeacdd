"""What the benchmarks run on: random models of real shapes, and random tokens.

A forward pass and a merge take the same time on random weights as on trained ones, so that no
benchmark needs a network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks.harness import Launch, Measured

Shape = dict[str, Any]


def _llama(hidden: int, inner: int, layers: int, heads: int, groups: int, words: int) -> Shape:
    return {
        "vocab_size": words,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }


SHAPES = {
    "tiny": _llama(32, 48, 2, 4, 2, 96),
    "wider": _llama(48, 96, 2, 4, 2, 96),
    "widest": _llama(64, 128, 3, 4, 2, 96),
    "Llama 45M": _llama(384, 1024, 15, 6, 2, 49152),
    "SmolLM2-135M": _llama(576, 1536, 30, 9, 3, 49152),
    "SmolLM2-360M": _llama(960, 2560, 32, 15, 5, 49152),
    "Llama 3.2B": {**_llama(2560, 6912, 40, 20, 20, 32000), "tie_word_embeddings": False},
}
"""Name → arguments of transformers' ``LlamaConfig``."""

REAL = "SmolLM2-135M-Instruct"
"""The one model that is not random, and measured on text: from ``tests/real/smollm2.py``."""


@dataclass
class Workshop:
    """Where benchmarks run: makes each input once, in a process of its own."""

    folder: Path
    launch: Launch
    quick: bool = False
    rounds: int = 5
    _made: dict[tuple[Any, ...], Path] = field(default_factory=dict)

    def shape(self, name: str) -> str:
        """Return ``name``, or the smallest shape in a quick run."""
        return "tiny" if self.quick else name

    def model(self, shape: str, tuned: int = 0) -> Path:
        """Return a model in bfloat16; ``tuned`` > 0 is its so-manieth fine-tune (noise)."""
        if ("model", shape, tuned) not in self._made:
            path = self.folder / f"{shape} {tuned}"
            if shape == REAL and not tuned:
                path = Path(str(self.launch("build_smollm2")["folder"]))
            else:
                base = str(self.model(shape)) if tuned else None
                self.launch(
                    "build_model", shape=SHAPES.get(shape), out=str(path), seed=tuned, base=base
                )
            self._made["model", shape, tuned] = path
        return self._made["model", shape, tuned]

    def tokens(self, shape: str, sequences: int, length: int) -> Path:
        """Return a file of ``sequences`` rows of ``length`` random token ids."""
        key = ("tokens", shape, sequences, length)
        if key not in self._made:
            path = self.folder / f"{shape} {sequences} {length}.jsonl"
            words = SHAPES[shape]["vocab_size"]
            self.launch(
                "build_tokens", out=str(path), sequences=sequences, length=length, words=words
            )
            self._made[key] = path
        return self._made[key]

    def statistics(self, shape: str, tuned: int = 0) -> Path:
        """Return statistics of ``model(shape, tuned)``, of every kind, from a few tokens."""
        if ("statistics", shape, tuned) not in self._made:
            path = self.folder / f"{shape} {tuned} statistics"
            if shape == REAL:
                text = self.folder / "text.txt"
                self.launch("build_text", out=str(text))
                tokenizer = str(self.model(shape))  # fine-tunes are saved without
                self.calibrate(shape, text, path, tuned=tuned, samples=16, tokenizer=tokenizer)
            else:
                few = self.tokens(shape, 4, 32) if self.quick else self.tokens(shape, 8, 512)
                self.calibrate(shape, few, path, tuned=tuned)
            self._made["statistics", shape, tuned] = path
        return self._made["statistics", shape, tuned]

    def calibrate(
        self,
        shape: str,
        tokens: Path,
        out: Path | None = None,
        *,
        tuned: int = 0,
        processes: int = 1,
        threads: int | None = None,
        **options: Any,
    ) -> Measured:
        """Calibrate once, into ``out`` or into a directory that is thrown away."""
        model = self.model(shape, tuned)
        with self.scratch() as scratch:
            return self.launch(
                "calibrate",
                processes=processes,
                threads=threads,
                options={
                    "model": str(model),
                    "dataset": str(tokens),
                    "out": str(out or scratch / "statistics"),
                    # As many as there are: fewer than asked for would only be remarked on.
                    "samples": len(tokens.read_text().splitlines()),
                    **options,
                },
            )

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory for one run's output."""
        with TemporaryDirectory(dir=self.folder) as name:
            yield Path(name)
