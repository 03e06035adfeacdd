"""A merge by mergekit's own ``run_merge``, whole or absent; and what it remembers, forgotten."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from mergekit.architecture.auto import infer_architecture_info
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_arm.errors import Failure, first_line
from mergekit_arm.files import fresh_directory, publish, remove
from mergekit_arm.merging.documents import models_of
from mergekit_arm.statistics.read import forget

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
