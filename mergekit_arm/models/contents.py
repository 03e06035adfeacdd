"""What a model holds, without loading it: names, shapes, and a hash that recognises it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from mergekit.common import ModelReference
from safetensors import SafetensorError

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.files import is_path, sampled_hash
from mergekit_arm.models.tensors import open_tensors

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CONFIGS = ("config.json", ADAPTER_CONFIG)
_PROBE = 64  # bytes


@dataclass(frozen=True)
class Contents:
    """A model's or adapter's tensors."""

    shapes: Mapping[str, tuple[int, ...]]
    """Empty for an adapter, and for pickled weights on the Hub."""
    parameters: int
    fingerprint: str
    """The Hub's commit, or a hash that recognises the files; see :func:`_recognise`."""


def describe(reference: str) -> Contents:
    """Describe a reference in mergekit's grammar; with an adapter, both parts' fingerprints.

    Of local files it reads the headers and a few bytes of each tensor, from the Hub metadata only.

    Raises:
        InputError: unreadable, incomplete, or not reachable.
    """
    try:
        parsed = ModelReference.parse(reference)
        model = _describe_part(parsed.model.path, parsed.model.revision)
        if parsed.lora is None:
            return model
        adapter = _describe_part(parsed.lora.path, parsed.lora.revision)
    except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"model {reference}: {first_line(error)}") from error
    return Contents(model.shapes, model.parameters, f"{model.fingerprint}+{adapter.fingerprint}")


def is_there(reference: str) -> bool:
    """Say whether :func:`describe` finds a model whole."""
    try:
        describe(reference)
    except InputError:
        return False
    return True


def shortened(fingerprint: str) -> str:
    """Return the first digits of a fingerprint, of an adapter's model and of the adapter."""
    return "+".join(part[:16] for part in fingerprint.split("+"))


def is_adapter(folder: Path) -> bool:
    """Say whether a directory holds an adapter and no whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def missing_part(folder: Path) -> str | None:
    """Return what a model or adapter directory lacks, or None where it is complete.

    Every shard must be as long as its header says: a file that is still being written, or
    was cut off, is not.
    """
    if is_adapter(folder):
        weights = [folder / name for name in _ADAPTER_WEIGHTS if (folder / name).is_file()][:1]
        if not weights:
            return "no adapter weights"
    elif not (folder / "config.json").is_file():
        return "no config.json"
    else:
        try:
            weights = _shards(folder)
        except (OSError, ValueError, KeyError) as error:
            return f"a damaged index ({first_line(error)})"
        if not weights:
            return "no weights that mergekit reads (model.safetensors or pytorch_model.bin)"
    for file in weights:
        if not file.is_file():
            return f"no {file.name}"
        try:
            if file.suffix == ".safetensors":
                _check_length(file)
            elif not zipfile.is_zipfile(file):  # its directory is at the end
                return f"a truncated {file.name}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"a truncated {file.name} ({first_line(error)})"
    return None


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold a local directory's weights."""
    if is_adapter(folder):
        return [folder / name for name in _ADAPTER_WEIGHTS if (folder / name).is_file()][:1]
    return _shards(folder)


def _shards(folder: Path) -> list[Path]:
    # The order in which mergekit looks.
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / shard for shard in sorted(set(names))]
        if (folder / name).is_file():
            return [folder / name]
    return []


def _describe_part(path: str, revision: str | None) -> Contents:
    folder = Path(path)
    if not folder.is_dir():
        return _describe_remote(path, revision)
    problem = missing_part(folder)
    if problem:
        raise InputError(f"model {path}: {problem}")
    digest = hashlib.sha256()
    for name in _CONFIGS:
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    for file in weight_files(folder):
        digest.update(_recognise(file).encode())
    if is_adapter(folder):
        return Contents({}, 0, digest.hexdigest())
    shapes = _shapes(path, folder)
    return Contents(shapes, sum(math.prod(shape) for shape in shapes.values()), digest.hexdigest())


def _shapes(path: str, folder: Path) -> dict[str, tuple[int, ...]]:
    files = open_tensors(path, folder)  # which refuses an index that promises too much
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":  # mapped, where reading one tensor reads no values
            return {name: tuple(files.get(name).shape) for name in files.names}
        with _opened(file) as descriptor:
            header = json.loads(_header(descriptor))
        shapes |= {name: tuple(header[name]["shape"]) for name in files.names if name in header}
    return dict(sorted(shapes.items()))


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    """Open a file of which little is read: of a mapped one the kernel reads what is near, too."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        yield descriptor
    finally:
        os.close(descriptor)


def _check_length(file: Path) -> None:
    """Refuse a file that is not as long as its header says.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is shorter or longer, or has no header.
    """
    with _opened(file) as descriptor:
        header = _header(descriptor)
    ends = [one["data_offsets"][1] for name, one in json.loads(header).items() if name[:2] != "__"]
    if 8 + len(header) + max(ends, default=0) != file.stat().st_size:
        raise ValueError("it is not as long as its header says")


def _header(descriptor: int) -> bytes:
    """Return the JSON at the beginning of a safetensors file, whose length stands before it."""
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > os.fstat(descriptor).st_size:
        raise ValueError("it is no safetensors file")
    return os.pread(descriptor, length, 8)


def _recognise(file: Path) -> str:
    """Return a hash that another training's weights do not have, without reading them all.

    Of safetensors it covers the size, the header and ``_PROBE`` bytes in the middle of every
    tensor; of torch's archives the names, sizes and checksums of their members. It misses an
    edit of single values outside these bytes that leaves the file's size as it is: training
    changes nearly every value. Times are left out, since a copy is the same model.
    """
    if file.suffix != ".safetensors":
        if not zipfile.is_zipfile(file):  # torch before 1.6
            return sampled_hash(file)
        with zipfile.ZipFile(file) as archive:
            members = [(one.filename, one.file_size, one.CRC) for one in archive.infolist()]
        return hashlib.sha256(repr(members).encode()).hexdigest()
    with _opened(file) as descriptor:
        header = _header(descriptor)
        digest = hashlib.sha256(header)
        digest.update(str(file.stat().st_size).encode())
        for name, tensor in sorted(json.loads(header).items()):
            if name != "__metadata__":
                start, end = tensor["data_offsets"]
                middle = 8 + len(header) + max(start, (start + end - _PROBE) // 2)
                digest.update(os.pread(descriptor, min(_PROBE, end - start), middle))
    return digest.hexdigest()


def _describe_remote(path: str, revision: str | None) -> Contents:
    if is_path(path):
        raise InputError(f"model {path}: no such directory")
    try:
        commit = huggingface_hub.HfApi().model_info(path, revision=revision).sha
    except Exception as error:  # without a network the client raises from three libraries
        return _describe_cached(path, revision, error)
    try:
        metadata = huggingface_hub.get_safetensors_metadata(path, revision=revision)
    except huggingface_hub.errors.NotASafetensorsRepoError:
        return Contents({}, 0, str(commit))  # an adapter, or pickled weights
    shapes = {
        name: tuple(tensor.shape)
        for file in metadata.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
    return Contents(shapes, sum(map(math.prod, shapes.values())), str(commit))


def _describe_cached(path: str, revision: str | None, cause: Exception) -> Contents:
    try:
        folder = huggingface_hub.snapshot_download(path, revision=revision, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {path}: neither a directory here nor reachable on the Hub ({first_line(cause)})"
        ) from error
    cached = _describe_part(folder, None)
    # The cache names its snapshots by commit.
    return Contents(cached.shapes, cached.parameters, Path(folder).name)
