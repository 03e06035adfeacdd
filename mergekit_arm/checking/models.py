"""The models of a configuration, from their headers and configurations alone.

mergekit asks its ``LoaderCache`` for a model's tensors, which downloads a Hub model and merges an
adapter. While a check plans, the cache holds loaders that know a model's names and no values.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex, ShardInfo
from mergekit.io.tasks import LoaderCache
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from mergekit_arm.checking.document import Document, Place
from mergekit_arm.checking.findings import Findings
from mergekit_arm.errors import InputError, first_line
from mergekit_arm.files import is_path
from mergekit_arm.methods.planning import HeadersOnly
from mergekit_arm.models.contents import missing_part
from mergekit_arm.models.tensors import CheckpointTensors

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""safetensors' names of dtypes."""


@dataclass(frozen=True)
class Header:
    """What a file says of one tensor before its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Model:
    """One input model."""

    reference: ModelReference
    config: PretrainedConfig
    headers: Mapping[str, Header]
    """By the names in its files; of base+adapter, the base's: merging changes none."""
    folder: Path | None
    """Where its weights lie as they will be merged; None on the Hub, and with an adapter."""

    def loader(self) -> LazyTensorLoader:
        """Return what mergekit may look into while it plans."""
        if self.folder is not None:
            return LazyTensorLoader(ShardedTensorIndex.from_disk(str(self.folder)))
        names = dict.fromkeys(self.headers, "model.safetensors")
        shards = [ShardInfo("model.safetensors", list(names))]
        return HeadersOnly(ShardedTensorIndex("", True, names, shards))


def read_models(
    references: list[ModelReference],
    findings: Findings,
    *,
    trust_remote_code: bool,
    lora_cache: str | None,
) -> dict[ModelReference, Model]:
    """Return the models that can be read, with a finding for each other."""
    found = {}
    for reference in sorted(references, key=str):
        place = place_of(findings.document, reference)
        try:
            found[reference] = read_model(reference, trust_remote_code)
        except InputError as error:
            findings.error(place, error.message)
            continue
        _check_card(reference, place, findings)
        if reference.lora is not None and lora_cache is None:
            findings.error(
                place,
                "mergekit merges an adapter into its model first, and has to be told where: "
                "pass --lora-merge-cache DIRECTORY, here and to mergekit-yaml",
            )
        elif found[reference].folder is None:
            findings.note(place, "its values are not compared with statistics: not a plain local "
                                 "model, and only its headers were read")  # fmt: skip
    return found


def read_model(reference: ModelReference, trust_remote_code: bool) -> Model:
    """Read a model's configuration and headers.

    Raises:
        InputError: it is absent, damaged, or has no configuration that transformers knows.
    """
    path, revision = reference.model.path, reference.model.revision
    if os.path.isdir(path):
        lacking = missing_part(Path(path))
        if lacking:
            raise InputError(f"model {path} has {lacking}: copy or download it again")
        folder = Path(path)
        headers = _local_headers(path, folder)
    elif os.path.exists(path) or is_path(path):
        kind = "is a file" if os.path.exists(path) else "no such directory"
        raise InputError(f"model {path}: {kind}; name a model's directory, or its name on the Hub")
    else:
        headers, folder = _hub_headers(path, revision), None
    if reference.lora is not None:
        _check_adapter(reference.lora.path, reference.lora.revision)
        folder = None
    try:
        config = reference.config(trust_remote_code=trust_remote_code)
        count = len(config.architectures or [])
    except Exception as error:  # whatever code the configuration's class runs
        raise InputError(f"model {reference}: its config.json: {first_line(error)}") from error
    if count != 1:
        raise InputError(
            f"model {reference}: config.json names {count} architectures; mergekit needs "
            'one, such as "architectures": ["LlamaForCausalLM"]'
        )
    return Model(reference, config, headers, folder)


def place_of(document: Document, reference: ModelReference) -> Place:
    """Return where a model is named first."""
    for place, value in document.leaves():
        if isinstance(value, str) and value == str(reference):
            return place
    for place, value in document.leaves():
        if isinstance(value, str) and value == reference.model.path:
            return place
    return ()


@contextmanager
def loaders(models: Mapping[ModelReference, Model]) -> Iterator[None]:
    """Let mergekit's cache hold these models' loaders and no others, for a while."""
    cache: dict[ModelReference, Any] = LoaderCache.loaders
    before = dict(cache)
    cache.clear()
    cache.update({reference: model.loader() for reference, model in models.items()})
    try:
        yield
    finally:
        cache.clear()
        cache.update(before)


def _check_card(reference: ModelReference, place: Place, findings: Findings) -> None:
    """Find a directory that mergekit asks the Hub about, when it writes the card at the end."""
    for part in (reference.model, reference.lora):
        if part is None or not os.path.exists(part.path) or part.path.startswith(("/", "~")):
            continue
        try:
            validate_repo_id(part.path)
        except huggingface_hub.errors.HFValidationError:
            continue
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            findings.error(
                place,
                f"mergekit asks the Hub whether {part.path} is there too, which fails offline, and "
                f"after the merge: write ./{part.path}",
            )


def _local_headers(model: str, folder: Path) -> dict[str, Header]:
    try:
        index = ShardedTensorIndex.from_disk(str(folder))
        if not index.is_safetensors:
            files = CheckpointTensors(folder)  # maps pickled files, and unpickles numbers only
            pickled = {name: files.get(name) for name in files.names}
            return {name: Header(tuple(one.shape), one.dtype) for name, one in pickled.items()}
        found = {}
        for shard in index.shards:
            with safe_open(folder / shard.filename, framework="pt") as file:
                for name in shard.contained_keys:
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype(), torch.uint8)
                    found[name] = Header(tuple(part.get_shape()), dtype)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(
            f"model {model}: its weights cannot be read ({first_line(error)}); copy or download "
            "it again"
        ) from error
    return found


def _hub_headers(name: str, revision: str | None) -> dict[str, Header]:
    try:
        metadata = huggingface_hub.get_safetensors_metadata(name, revision=revision)
        return {
            tensor: Header(tuple(one.shape), _DTYPES.get(one.dtype, torch.uint8))
            for file in metadata.files_metadata.values()
            for tensor, one in file.tensors.items()
        }
    except huggingface_hub.errors.NotASafetensorsRepoError as error:
        raise InputError(
            f"model {name}: no safetensors on the Hub, so that nothing is known of it before it "
            "is downloaded: download it, and name the directory"
        ) from error
    except Exception as error:  # without a network the client raises from three libraries
        try:
            folder = huggingface_hub.snapshot_download(
                name, revision=revision, local_files_only=True
            )
        except (OSError, ValueError) as absent:
            raise InputError(
                f"model {name}: neither a directory here nor reachable on the Hub "
                f"({first_line(error)})"
            ) from absent
        raise InputError(
            f"model {name}: mergekit asks the Hub for a list of its files even where all of them "
            f"are cached ({first_line(error)}): name the directory {folder}"
        ) from error


def _check_adapter(path: str, revision: str | None) -> None:
    if os.path.isdir(path):
        lacking = missing_part(Path(path))
        if lacking:
            raise InputError(f"adapter {path} has {lacking}: copy or download it again")
    elif is_path(path):
        raise InputError(f"adapter {path}: no such directory")
    else:
        try:
            huggingface_hub.HfApi().model_info(path, revision=revision)
        except Exception as error:  # without a network the client raises from three libraries
            raise InputError(
                f"adapter {path}: neither a directory here nor reachable on the Hub "
                f"({first_line(error)})"
            ) from error
