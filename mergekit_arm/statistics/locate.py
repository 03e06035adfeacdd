"""Where a statistics directory lies, here or on the Hub, and whether it is whole."""

from __future__ import annotations

import os
import re
from pathlib import Path

import huggingface_hub.errors
import pydantic
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.statistics.format import FORMAT_VERSION, METADATA_FILE, Metadata


def locate(reference: str) -> Path:
    """Return the directory that ``reference`` names, downloading it from the Hub if need be.

    Raises:
        InputError: it is neither a directory nor readable on the Hub.
    """
    if os.path.isdir(reference):
        return Path(reference).resolve()
    if reference.startswith((".", "/", "~")) or reference.count("/") != 1:
        raise InputError(
            f"activation_stats {reference}: no such directory; "
            "`mergekit-arm calibrate MODEL DIRECTORY` writes one"
        )
    try:
        return Path(_hub_path(reference))
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        raise InputError(
            f"activation_stats {reference}: neither a directory here nor readable on the Hub "
            f"({first_line(error)})"
        ) from error


def version(reference: str, path: Path) -> tuple[int, int]:
    """Return what changes when the directory ``path`` is replaced.

    Raises:
        InputError: it is no statistics directory.
    """
    try:
        status = os.stat(f"{path}{os.sep}{METADATA_FILE}")
    except OSError as error:
        raise InputError(
            f"activation_stats {reference}: no {METADATA_FILE} in it, so it is no statistics "
            "directory; `mergekit-arm calibrate` writes one"
        ) from error
    return status.st_mtime_ns, status.st_ino


def read_metadata(reference: str, path: Path) -> Metadata:
    """Return what the directory ``path`` says of itself; ``reference`` is for messages.

    Raises:
        InputError: no statistics directory, a newer format, or a damaged file.
    """
    version(reference, path)
    try:
        text = (path / METADATA_FILE).read_text(encoding="utf-8")
        found = re.search(r'"format_version":\s*(\d+)', text)
        if found and int(found.group(1)) > FORMAT_VERSION:
            raise InputError(
                f"activation_stats {reference}: format {found.group(1)} is newer than this "
                f"mergekit-arm reads ({FORMAT_VERSION}): pip install -U mergekit-arm"
            )
        return Metadata.model_validate_json(text)
    except (OSError, UnicodeDecodeError, pydantic.ValidationError) as error:
        detail = (
            f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
            if isinstance(error, pydantic.ValidationError)
            else first_line(error)
        )
        raise InputError(
            f"activation_stats {reference}: {METADATA_FILE} is damaged ({detail}); "
            "copy or measure it again"
        ) from error


def _hub_path(reference: str) -> str:
    # mergekit's own download lists the repository first, which fails without a network even
    # where everything is cached.
    model = ModelReference.parse(reference).model
    return huggingface_hub.snapshot_download(
        model.path,
        revision=model.revision,
        cache_dir=LoaderCache().hf_cache_dir,
        allow_patterns=["*.json", "*.safetensors", "README.md"],
    )
