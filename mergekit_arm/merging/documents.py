"""mergekit configurations that we write: as text, as a command to repeat by hand, in a message."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from mergekit._data import chat_templates
from mergekit.config import ConfigYamlDumper, MergeConfiguration
from mergekit.options import MergeOptions
from pydantic import ValidationError

from mergekit_arm.errors import InputError, check_choice, did_you_mean, first_line
from mergekit_arm.sections import explain

FINAL_DTYPES = ("bfloat16", "float16", "float32", "float64")
"""What a merged model can be in."""


def check_dtype(key: str, name: object) -> None:
    """Check the name of a merged model's dtype, which may be None.

    Raises:
        InputError: there is no such dtype.
    """
    if name is not None:
        check_choice(key, name, FINAL_DTYPES)


def accepted(document: Mapping[str, Any]) -> MergeConfiguration:
    """Return what mergekit makes of a configuration.

    Raises:
        InputError: it does not parse.
    """
    try:
        return MergeConfiguration.model_validate(dict(document))
    except (ValidationError, RuntimeError) as error:
        why = explain(error, {}) if isinstance(error, ValidationError) else first_line(error)
        raise InputError(f"mergekit does not accept it: {why}") from error


def check_chat_template(template: str | None) -> None:
    """Refuse what mergekit would only log, leaving the tokenizer out of every model.

    Raises:
        InputError: neither ``auto``, nor a template that mergekit has, nor one itself.
    """
    if template is None or template == "auto" or "{" in template:
        return
    names = [Path(file.name) for file in resources.files(chat_templates).iterdir()]
    known = sorted(name.stem for name in names if name.suffix == ".jinja")
    if template not in known:
        raise InputError(
            f"chat_template: mergekit has no {template!r}{did_you_mean(template, known)}; there "
            f"are: auto, {', '.join(known)}, or give the template itself"
        )


def to_yaml(document: Mapping[str, Any], comment: Iterable[str] = ()) -> str:
    """Return the configuration's text, ``comment`` lines first."""
    lines = "".join(f"# {line}\n" for line in comment)
    return lines + str(yaml.dump(dict(document), Dumper=ConfigYamlDumper, sort_keys=False))


def by_hand(config_file: Path, options: MergeOptions, document: Mapping[str, Any]) -> str:
    """Return the ``mergekit-yaml`` command that repeats a merge, with the flags that change it."""
    words = ["mergekit-yaml", str(config_file), "OUT"]
    if "+" in models_of(document):
        words += ["--lora-merge-cache", "CACHE"]
    for name in ("random_seed", "lora_merge_dtype"):
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    for name in ("allow_crimes", "unsafe_truncate_embeddings", "trust_remote_code"):
        if getattr(options, name):
            words.append(f"--{name.replace('_', '-')}")
    return shlex.join(words)


def models_of(document: Mapping[str, Any]) -> str:
    """Return the models of a configuration, for a message: ``a, b into base``."""
    models = [str(entry["model"]) for entry in document.get("models", ())] or ["slices"]
    base = document.get("base_model")
    return f"{', '.join(models)}{f' into {base}' if base else ''}"
