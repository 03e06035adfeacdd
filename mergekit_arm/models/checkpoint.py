"""A checkpoint's tensors, read one at a time."""

from __future__ import annotations

from pathlib import Path
from zipfile import is_zipfile

import torch
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.models.loading import Source

_FILES = ("model.safetensors", "pytorch_model.bin")


class BriefLoader:
    """Reads tensors of a checkpoint; a file is mapped only while a tensor of it is in use.

    Pages of a mapped file count as memory of the process: a loader that keeps its file open
    ends up with all of it.
    """

    def __init__(self, index: ShardedTensorIndex) -> None:
        self.index = index

    def get_tensor(self, name: str) -> Tensor:
        """Return a tensor of the checkpoint, mapped where the file allows it.

        Raises:
            KeyError: it has no such tensor.
        """
        path = Path(self.index.base_path, self.index.tensor_paths[name])
        if self.index.is_safetensors:
            with safe_open(path, framework="pt") as file:
                stored: Tensor = file.get_tensor(name)
            return stored
        # Files of torch before 1.6 are no archives, and cannot be mapped.
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
        unpacked: Tensor = saved.get("state_dict", saved)[name]
        return unpacked

    def size(self, dtype: torch.dtype) -> int:
        """Return the bytes that all weights take in ``dtype``; reads headers only."""
        if not self.index.is_safetensors:
            stored = self.get_tensor(next(iter(self.index.tensor_paths))).itemsize
            return self.bytes_on_disk() * dtype.itemsize // stored
        count = 0
        for shard in self.index.shards:
            with safe_open(Path(self.index.base_path, shard.filename), framework="pt") as file:
                for name in shard.contained_keys:
                    count += torch.Size(file.get_slice(name).get_shape()).numel()
        return count * dtype.itemsize

    def bytes_on_disk(self) -> int:
        """Return the size of the checkpoint's files."""
        return sum(
            Path(self.index.base_path, shard.filename).stat().st_size for shard in self.index.shards
        )


def fetch_checkpoint(source: Source) -> None:
    """Download the weights of a Hub model into its cache, as transformers would.

    Raises:
        InputError: it has none, or cannot be reached.
    """
    if Path(source.name).is_dir():
        return
    try:
        for name in _FILES:
            index = cached_file(
                source.name,
                f"{name}.index.json",
                revision=source.revision,
                _raise_exceptions_for_missing_entries=False,
            )
            if index:
                get_checkpoint_shard_files(source.name, index, revision=source.revision)
                return
            if cached_file(
                source.name,
                name,
                revision=source.revision,
                _raise_exceptions_for_missing_entries=False,
            ):
                return
    except OSError as error:
        raise InputError(f"model {source.reference}: {first_line(error)}") from error
    raise InputError(f"model {source.reference} has neither {' nor '.join(_FILES)}")
