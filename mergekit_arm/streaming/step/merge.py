"""One step's merge: an ordinary mergekit configuration, run by mergekit's own ``run_merge``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psutil
from mergekit.architecture.auto import infer_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_arm.errors import Failure, first_line
from mergekit_arm.files import fresh_directory, publish, remove
from mergekit_arm.models.tokenizer import load_own_tokenizer
from mergekit_arm.statistics.read import forget
from mergekit_arm.streaming.plan.document import models_of

_GENERATION = "generation_config.json"


def merge(document: Mapping[str, Any], text: str, out: Path, options: MergeOptions) -> None:
    """Run the merge ``document`` (as ``text``) into ``out``: complete or absent.

    What a merge that fails has written is removed: on a full disk it would be in the way.

    Raises:
        click.ClickException: one of our own methods refused.
        Failure: anything else that mergekit raised.
    """
    configuration = MergeConfiguration.model_validate(dict(document))
    staging = fresh_directory(out.with_name(f".{out.name}.partial"))
    try:
        run_merge(configuration, str(staging), options=options, config_source=text)
        _copy_generation_config(configuration, staging, options)
        remove(out)
        publish(staging, out)
    except click.ClickException:
        raise
    except Exception as error:  # mergekit raises whatever its parts raise
        raise Failure(
            f"mergekit could not merge {models_of(document)}: {first_line(error)}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _copy_generation_config(
    configuration: MergeConfiguration, out: Path, options: MergeOptions
) -> None:
    """Copy what mergekit leaves out where it writes a tokenizer of its own."""
    base = configuration.base_model or configuration.referenced_models()[0]
    if (out / _GENERATION).exists() or not options.copy_tokenizer:
        return
    if base.lora is not None:
        base = base.merged(
            cache_dir=options.lora_merge_cache,
            trust_remote_code=options.trust_remote_code,
            lora_merge_dtype=options.lora_merge_dtype,
        )
    file = Path(base.local_path(cache_dir=options.transformers_cache)) / _GENERATION
    if file.is_file():
        shutil.copy(file, out)


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
    for left in cache.glob(".partial.*"):
        if not psutil.pid_exists(int(left.suffix[1:])):
            remove(left)
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


@contextmanager
def forgetting(references: Iterable[str], statistics: Iterable[str] = ()) -> Iterator[None]:
    """Drop afterwards what mergekit and the statistics reader remember of a step.

    Their caches live as long as the process and are keyed by name: a stream would keep every
    model it ever read open on the disk, and read an earlier one under a name used again.
    """
    try:
        yield
    finally:
        for reference in references:
            LoaderCache.loaders.pop(ModelReference.parse(reference), None)
        forget_plans()
        infer_architecture_info.cache_clear()
        for path in statistics:
            forget(Path(path))


def forget_plans() -> None:
    """Drop the plans of merges that are over: mergekit keeps the tasks of the last forty or so."""
    MergePlanner._model_arch.cache_clear()
