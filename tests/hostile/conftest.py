"""A working directory with a family of models, statistics and data to name in commands."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.models import tiny_llama


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer: one token for each byte, and no chat template."""
    folder = tmp_path_factory.mktemp("speaker")
    model = tiny_llama(3)
    model.resize_token_embeddings(256)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A directory that no disk is behind, where there is one: for what is written by the thousand.

    A file system may wait for the disk whenever a file is written over.
    """
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def here(
    family: Path,
    speaker: Path,
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The working directory: ``base``, ``a``, ``b``, ``stats``, ``speaker``, ``tokens.jsonl``."""
    for name in ("base", "a", "b", "stats"):
        (tmp_path / name).symlink_to(family / name)
    (tmp_path / "speaker").symlink_to(speaker)
    (tmp_path / "tokens.jsonl").symlink_to(token_file)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path
