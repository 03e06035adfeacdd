"""A model's tokenizer, and whether it has one."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from mergekit.common import ModelPath, ModelReference
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mergekit_arm.errors import InputError, first_line

_NAMES = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "sentencepiece*", "*.tiktoken")
"""Files of which every tokenizer has at least one."""


def load_own_tokenizer(reference: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Return a model's tokenizer, an adapter's own before its base's; None where there is none.

    Raises:
        InputError: there is one, and it cannot be loaded.
    """
    parsed = ModelReference.parse(reference)
    # A trainer saves the tokenizer beside the adapter.
    for part in (parsed.lora, parsed.model):
        if part is not None:
            tokenizer = _load(reference, part, trust_remote_code)
            if tokenizer is not None:
                return tokenizer
    return None


def _load(
    reference: str, part: ModelPath, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(
            part.path, revision=part.revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        # transformers and tokenizers raise all kinds of errors, where there is none as well.
        if not any(Path(name).match(known) for name in _files(part) for known in _NAMES):
            return None
        remedy = (
            "read its code, and add --trust-remote-code"
            if "trust_remote_code" in str(error)
            else "mend it, or give rows of input_ids, which need none"
        )
        raise InputError(
            f"model {reference}: the tokenizer of {part.path} cannot be loaded "
            f"({first_line(error)}): {remedy}"
        ) from error


def _files(part: ModelPath) -> list[str]:
    """Return the names of a model's files; those in the cache where the Hub cannot be asked."""
    folder = Path(part.path)
    try:
        if not folder.is_dir():
            return huggingface_hub.list_repo_files(part.path, revision=part.revision)
    except Exception:  # without a network the client raises from three libraries
        try:
            found = huggingface_hub.snapshot_download(
                part.path, revision=part.revision, local_files_only=True
            )
        except (OSError, ValueError):
            return []
        folder = Path(found)
    return [path.name for path in folder.iterdir()]
