"""What the others run on; nothing is compared here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def build_model(shape: dict[str, Any], out: str, seed: int, base: str | None) -> dict[str, float]:
    """Save a random Llama, or ``base`` with noise on every weight, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    if base is None:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model.save_pretrained(out)
    return {}


def build_smollm2() -> dict[str, str]:
    """Build the real SmolLM2-135M-Instruct, or find it built; say where it is."""
    from tests.real.smollm2 import smollm2

    return {"folder": str(smollm2())}


def build_text(out: str) -> dict[str, float]:
    """Write the English text that ships with Python: its language reference."""
    from pydoc_data.topics import topics

    Path(out).write_text("\n\n".join(topics.values()), encoding="utf-8")
    return {}


def build_tokens(out: str, sequences: int, length: int, words: int) -> dict[str, float]:
    """Write rows of random token ids."""
    import torch

    rows = torch.randint(words, (sequences, length), generator=torch.Generator().manual_seed(0))
    lines = [json.dumps({"input_ids": row}) + "\n" for row in rows.tolist()]
    Path(out).write_text("".join(lines))
    return {}


TASKS = (build_model, build_smollm2, build_text, build_tokens)
