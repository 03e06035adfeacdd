"""What the tests of streams share: a tiny training run on disk, and configurations for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from mergekit_arm.demo.train import train_tokenizer
from tests.support.models import VOCABULARY, perturbed, tiny_llama


def write_run(
    folder: Path, numbers: Sequence[int] = (10, 20, 30), *, scale: float = 0.02
) -> list[PreTrainedModel]:
    """Save ``base``, ``run/checkpoint-N`` and ``tokens.jsonl``; return base and checkpoints."""
    models: list[PreTrainedModel] = [tiny_llama(0)]
    models[0].save_pretrained(folder / "base")
    for number in numbers:
        models.append(perturbed(models[-1], number, scale))
        models[-1].save_pretrained(folder / "run" / f"checkpoint-{number}")
    write_tokens(folder / "tokens.jsonl", 6)
    return models


def write_tokens(path: Path, seed: int, rows: int = 8, length: int = 24) -> Path:
    """Write rows of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (rows, length), generator=generator).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids))
    return path


def add_tokenizer(folder: Path, *, template: str | None = None) -> Any:
    """Save a byte-level tokenizer into a model's directory; its ids fit models of 320 tokens."""
    tokenizer = train_tokenizer(["a small text about nothing much"] * 4, 320)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_with_another_token(folder: Path) -> Any:
    """Save ``base``, and ``a`` with one token more, ``<call>``; return the tokenizer of ``a``."""
    base = tiny_llama(0)
    size = len(add_tokenizer(folder / "base"))
    base.resize_token_embeddings(size)
    base.save_pretrained(folder / "base")
    longer = perturbed(base, 1)
    longer.resize_token_embeddings(size + 1)
    longer.save_pretrained(folder / "a")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.add_tokens(["<call>"])
    tokenizer.save_pretrained(folder / "a")
    return tokenizer


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return a stream's configuration on ``write_run``'s files; None removes a key."""
    document: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "checkpoints": str(folder / "run"),
        "learning_rate": 0.5,
        "dtype": "float32",
    }
    document.update(changes)
    return {key: value for key, value in document.items() if value is not None}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read a model's tensors."""
    return load_file(folder / "model.safetensors")


def digest(out: Path) -> dict[str, str]:
    """Return the hash of everything a stream leaves that must not depend on its interruptions.

    Left out: how long things took, and the lock.
    """
    found = {}
    for path in sorted(out.rglob("*")):
        if not path.is_file() or path.name in (".lock", "stream_state.json"):
            continue
        content = path.read_bytes()
        if path.name == "stream.jsonl":
            lines = content.decode().splitlines()
            untimed = [{**json.loads(line), "seconds": None} for line in lines]
            content = json.dumps(untimed).encode()
        found[str(path.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found
