"""The real model and two fine-tunes of it, made once for all tests that need them."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from mergekit_arm.demo.text import DomainText, standard_library
from mergekit_arm.demo.train import token_blocks, train
from tests.real import smollm2
from tests.real.smollm2 import EVERY, LENGTH

STEPS = {"prose": 16, "code": 8}
"""Of each fine-tune."""


@pytest.fixture(scope="session")
def base() -> Path:
    """SmolLM2-135M-Instruct: bfloat16, tied embeddings, tokenizer with chat template."""
    try:
        return smollm2.smollm2()
    except smollm2.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def corpora() -> dict[str, DomainText]:
    """Real text from this machine's Python: general, prose and code."""
    return standard_library(characters=200_000)


@pytest.fixture(scope="session")
def run(
    base: Path, corpora: dict[str, DomainText], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Path]]:
    """Return a function that fine-tunes on a domain, once: a directory of ``checkpoint-N``."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def fine_tune(domain: str) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        train(
            model,
            tokenizer,
            token_blocks(tokenizer, corpora[domain].train, LENGTH),
            steps=STEPS[domain],
            learning_rate=5e-5,
            batch_size=1,
            folder=folder / domain,
            save_at=range(EVERY, STEPS[domain] + 1, EVERY),
        )
        return folder / domain

    yield fine_tune
    # pytest keeps the folders of three sessions; these would be ten gigabytes.
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def variants(run: Callable[[str], Path]) -> dict[str, Path]:
    """The last checkpoint of a fine-tune on prose, and of one on code."""
    return {domain: run(domain) / f"checkpoint-{steps}" for domain, steps in STEPS.items()}
