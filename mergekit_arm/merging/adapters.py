"""Adapters merged into their models, in mergekit's own cache of such models."""

from __future__ import annotations

import os
from pathlib import Path

from mergekit.common import ModelReference
from mergekit.options import MergeOptions

from mergekit_arm.errors import Failure, first_line
from mergekit_arm.files import fresh_directory, publish, remove
from mergekit_arm.models.tokenizer import load_own_tokenizer
from mergekit_arm.outputs import remove_orphans


def merge_adapter(reference: str, options: MergeOptions) -> str:
    """Put base+adapter into mergekit's own cache of such models, complete or absent.

    Returns a reference without adapter: the merged model's, or ``reference`` if it has none.
    mergekit takes any directory it finds there for a finished one, so that a kill in the midst
    of writing it would poison every later merge.
    """
    parsed = ModelReference.parse(reference)
    if parsed.lora is None:
        return reference
    assert options.lora_merge_cache is not None  # the stream always names one
    cache = Path(options.lora_merge_cache)
    final = cache / f"{parsed.model._unique_id()}_{parsed.lora._unique_id()}"
    if final.exists():
        return str(final)
    remove_orphans(cache.glob(".partial.*"))
    staging = fresh_directory(cache / f".partial.{os.getpid()}")
    try:
        merged = parsed.merged(
            cache_dir=str(staging),
            trust_remote_code=options.trust_remote_code,
            lora_merge_dtype=options.lora_merge_dtype,
        )
        tokenizer = load_own_tokenizer(reference, options.trust_remote_code)
        if tokenizer is not None:  # mergekit leaves it out, and text cannot be measured without
            tokenizer.save_pretrained(merged.model.path)
        publish(Path(merged.model.path), final)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise Failure(f"adapter {reference}: {first_line(error)}") from error
    finally:
        remove(staging)
    return str(final)
