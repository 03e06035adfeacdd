"""Tokenizers and plain paths of models in mergekit's grammar."""

from __future__ import annotations

from mergekit.common import ModelReference
from transformers import PreTrainedTokenizerBase

from mergekit_arm.calibration.model import Source, load_tokenizer


def load_own_tokenizer(reference: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Return a model's tokenizer, an adapter's own before its base's; None where there is none."""
    parsed = ModelReference.parse(reference)
    # A trainer saves the tokenizer beside the adapter.
    for part in (parsed.lora, parsed.model):
        if part is not None:
            source = Source(reference, part.path, part.revision, None, trust_remote_code)
            tokenizer = load_tokenizer(source)
            if tokenizer is not None:
                return tokenizer
    return None
