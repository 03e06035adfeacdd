"""Where a statistics directory lies, here or on the Hub, and whether it is whole."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pydantic
from safetensors import safe_open
from torch import Tensor

from mergekit_arm.errors import InputError, first_line, visible
from mergekit_arm.statistics.digest import DIGEST, document_digest
from mergekit_arm.statistics.format import FORMAT_VERSION, METADATA_FILE, Metadata

TENSOR_FILE = "model.safetensors"


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


Version = tuple[tuple[str, int, int, int], ...]
"""Name, time of change, inode and size of every file that is read of a directory."""


def version(reference: str, path: Path) -> Version:
    """Return what changes when the directory ``path``, or a file in it, is replaced.

    Raises:
        InputError: it is no statistics directory.
    """
    try:
        with os.scandir(path) as entries:
            found = sorted(
                (entry.name, status.st_mtime_ns, status.st_ino, status.st_size)
                for entry in entries
                if entry.name.endswith((".json", ".safetensors")) and (status := entry.stat())
            )
    except OSError:
        found = []
    if METADATA_FILE not in (name for name, *_ in found):
        raise InputError(
            f"activation_stats {reference}: no {METADATA_FILE} in it, so it is no statistics "
            "directory; `mergekit-arm calibrate` writes one"
        )
    return tuple(found)


def read_metadata(reference: str, path: Path) -> Metadata:
    """Return what the directory ``path`` says of itself; ``reference`` is for messages.

    Raises:
        InputError: no statistics directory, a newer format, or a file that is damaged or was
            edited.
    """
    version(reference, path)
    try:
        document = _parse(path / METADATA_FILE)
        number = document.get("format_version")
        if isinstance(number, int) and number > FORMAT_VERSION:
            raise InputError(
                f"activation_stats {reference}: format {number} is newer than this "
                f"mergekit-arm reads ({FORMAT_VERSION}): pip install -U mergekit-arm"
            )
        if is_provenance(document):
            named = ", ".join(str(one.get("reference")) for one in document["statistics"])
            raise InputError(
                f"activation_stats {reference}: this is a merged model; the statistics that it was "
                f"merged with are {visible(named)}"
            )
        metadata = Metadata.model_validate(document, strict=True)
    except (OSError, ValueError, RecursionError) as error:
        detail = (
            _first_error(error)
            if isinstance(error, pydantic.ValidationError)
            else first_line(error)
        )
        raise InputError(
            f"activation_stats {reference}: {METADATA_FILE} is damaged ({visible(detail)}); "
            "copy or measure it again"
        ) from error
    if metadata.digest not in (None, document_digest(document)):
        raise InputError(
            f"activation_stats {reference}: {METADATA_FILE} is not as it was written; copy or "
            f"measure it again, or remove its field {DIGEST} if it was edited on purpose"
        )
    return metadata


def is_provenance(document: Any) -> bool:
    """Say whether this is what a merged model says of the statistics it was merged with."""
    return (
        isinstance(document, dict)
        and {"merge_method", "statistics"} <= document.keys()
        and "sites" not in document
        and isinstance(document["statistics"], list)
        and all(isinstance(one, dict) for one in document["statistics"])
    )


def _parse(file: Path) -> dict[str, Any]:
    """Return a JSON object, in which no field stands twice and every number is finite.

    Raises:
        OSError, ValueError, RecursionError: the file holds none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{max(names, key=names.count)} stands in it twice")
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    text = file.read_text(encoding="utf-8")
    document = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    if not isinstance(document, dict):
        raise ValueError("it holds no fields")
    return document


class TensorFiles:
    """The safetensors files of a directory, mapped; a tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        """Open every file, which checks that it is as long as its header says.

        Raises:
            OSError, ValueError, SafetensorError: a file is absent, cannot be read, is shorter
                than its header says, or lacks what the index promises.
        """
        promised = _weight_map(path)
        self._file_of: dict[str, Any] = {}
        for file in sorted(set(promised.values())) or [TENSOR_FILE]:
            opened = safe_open(path / file, "pt")
            self._file_of |= dict.fromkeys(opened.keys(), opened)  # type: ignore[no-untyped-call]
        missing = promised.keys() - self._file_of.keys()
        if missing:
            raise ValueError(f"no shard holds {min(missing)}")

    @property
    def header(self) -> dict[str, tuple[bool, tuple[int, ...]]]:
        """Whether each tensor is of floating-point numbers, and its shape; reads no values."""
        found = {}
        for name, file in self._file_of.items():
            part = file.get_slice(name)
            floating = part.get_dtype().startswith(("F", "BF"))
            found[name] = (floating, tuple(part.get_shape()))
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def get(self, name: str) -> Tensor:
        """Return a tensor, on the CPU.

        Raises:
            KeyError: there is none of that name.
        """
        tensor: Tensor = self._file_of[name].get_tensor(name)
        return tensor


class _Index(pydantic.BaseModel):
    """What we read of ``model.safetensors.index.json``."""

    weight_map: dict[str, str] = pydantic.Field(min_length=1)
    """Tensor → the file it is in."""


def _weight_map(path: Path) -> dict[str, str]:
    """Return the index of a sharded directory, empty where there is none.

    mergekit's own reader would unpickle a ``pytorch_model.bin`` and follow any path.

    Raises:
        OSError, ValueError: it cannot be read, or names what is no file of the directory.
    """
    index = path / f"{TENSOR_FILE}.index.json"
    if not index.exists():
        return {}
    try:
        weight_map = _Index.model_validate_json(index.read_text(encoding="utf-8")).weight_map
    except pydantic.ValidationError as error:
        raise ValueError(f"{index.name} is damaged: {_first_error(error)}") from error
    for file in weight_map.values():
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise ValueError(f"{index.name} names {file!r}: no safetensors file of the directory")
    return weight_map


def _first_error(error: pydantic.ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _hub_path(reference: str) -> str:
    """Download a repository; OSError or HFValidationError where that is not possible."""
    name, at, revision = reference.partition("@")
    if at and not re.fullmatch(r"[^@+\s]+", revision):
        raise OSError("expected org/name or org/name@revision")
    # Not earlier: mergekit takes seconds, and what lies here is read without it.
    from mergekit.io.tasks import LoaderCache

    # mergekit's own download lists the repository first, which fails without a network even
    # where everything is cached.
    return huggingface_hub.snapshot_download(
        name,
        revision=revision or None,
        cache_dir=LoaderCache().hf_cache_dir,
        allow_patterns=["*.json", "*.safetensors", "README.md"],
    )
