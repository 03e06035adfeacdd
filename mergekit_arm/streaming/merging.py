"""One step's merge: an ordinary mergekit configuration, run by mergekit's own ``run_merge``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psutil
import yaml
from mergekit.architecture.auto import infer_architecture_info
from mergekit.common import ModelReference
from mergekit.config import ConfigYamlDumper, MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from mergekit_arm.errors import Failure, first_line
from mergekit_arm.statistics.reader import forget
from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.files import fresh_directory, publish, remove
from mergekit_arm.streaming.method import StepMethod
from mergekit_arm.streaming.models import load_own_tokenizer

STEP_DTYPE = "float32"
"""Of the running model: rounding it at every step would add up."""


def step_document(
    config: StreamConfig,
    method: StepMethod,
    *,
    current: str,
    checkpoint: str,
    learning_rate: float | None,
    statistics: Path | None,
    checkpoint_statistics: Path | None,
) -> dict[str, Any]:
    """Return the mergekit configuration of one step: ``current`` merged with ``checkpoint``."""
    shared = {**config.parameters, **method.fixed}
    incoming: dict[str, Any] = {}
    if method.rate_parameter and learning_rate is not None:
        (shared if method.rate_is_shared else incoming)[method.rate_parameter] = learning_rate
    if statistics is not None:
        shared["activation_stats"] = str(statistics)
    if checkpoint_statistics is not None:
        incoming["activation_stats"] = str(checkpoint_statistics)
    model: dict[str, Any] = {"model": checkpoint}
    if incoming:
        model["parameters"] = incoming
    document: dict[str, Any] = {
        "merge_method": method.name,
        "base_model": current,
        "models": [model],
        "dtype": STEP_DTYPE,
    }
    if shared:
        document["parameters"] = shared
    for key in ("tokenizer_source", "tokenizer", "chat_template"):
        value = getattr(config, key)
        if value is not None:
            document[key] = value
    return document


def cast_document(model: str, dtype: str) -> dict[str, Any]:
    """Return the mergekit configuration that copies ``model`` in another dtype."""
    return {"merge_method": "passthrough", "models": [{"model": model}], "out_dtype": dtype}


def to_yaml(document: Mapping[str, Any], comment: Iterable[str] = ()) -> str:
    """Return the configuration's text, ``comment`` lines first."""
    lines = "".join(f"# {line}\n" for line in comment)
    return lines + str(yaml.dump(dict(document), Dumper=ConfigYamlDumper, sort_keys=False))


def check_document(document: Mapping[str, Any]) -> None:
    """Let mergekit parse a configuration.

    Raises:
        ValueError: it does not (pydantic's error among them).
    """
    MergeConfiguration.model_validate(dict(document))


def by_hand(config_file: Path, options: MergeOptions, document: Mapping[str, Any]) -> str:
    """Return the ``mergekit-yaml`` command that repeats a merge, with the flags that change it."""
    words = ["mergekit-yaml", str(config_file), "OUT"]
    if "+" in _names(document):
        words += ["--lora-merge-cache", "CACHE"]
    for name in ("random_seed", "lora_merge_dtype"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name in ("allow_crimes", "unsafe_truncate_embeddings", "trust_remote_code"):
        if getattr(options, name):
            words.append(f"--{name.replace('_', '-')}")
    return shlex.join(words)


def merge(document: Mapping[str, Any], text: str, out: Path, options: MergeOptions) -> None:
    """Run the merge ``document`` (as ``text``) into ``out``: complete or absent.

    Raises:
        click.ClickException: one of our own methods refused.
        Failure: anything else that mergekit raised.
    """
    configuration = MergeConfiguration.model_validate(dict(document))
    staging = fresh_directory(out.with_name(f".{out.name}.partial"))
    try:
        run_merge(configuration, str(staging), options=options, config_source=text)
    except click.ClickException:
        raise
    except Exception as error:  # mergekit raises whatever its parts raise
        raise Failure(
            f"mergekit could not merge {_names(document)}: {first_line(error)}"
        ) from error
    remove(out)
    publish(staging, out)


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
def forgetting(references: Iterable[str], statistics: Iterable[Path | None]) -> Iterator[None]:
    """Drop afterwards what mergekit and the statistics reader remember of a step.

    Their caches live as long as the process and are keyed by name: a stream would keep every
    model it ever read open on the disk, and read an earlier one under a name used again.
    """
    try:
        yield
    finally:
        for reference in references:
            LoaderCache.loaders.pop(ModelReference.parse(reference), None)
        MergePlanner._model_arch.cache_clear()
        infer_architecture_info.cache_clear()
        for path in filter(None, statistics):
            forget(path)


def _names(document: Mapping[str, Any]) -> str:
    models = [str(entry["model"]) for entry in document["models"]]
    base = document.get("base_model")
    return f"{', '.join(models)}{f' into {base}' if base else ''}"
