"""A checkpoint's tensors, read one at a time.

Statistics have a reader of their own, which keeps its files open and unpickles nothing.
"""

from __future__ import annotations

from pathlib import Path
from zipfile import is_zipfile

import torch
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex, ShardInfo
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mergekit_arm.errors import InputError, first_line


class CheckpointTensors:
    """Reads tensors from the files that mergekit would read.

    A file is open only while one of its tensors is read, and mapped only while one is in use:
    pages of a mapped file count as memory of the process, so that a reader that keeps the files
    of a large model open ends up with all of it.

    mergekit's own ``LazyTensorLoader`` keeps the last file open, and looks through its names
    for every tensor.
    """

    def __init__(self, folder: Path) -> None:
        """Find the files in ``folder``, and look whether they hold what the index promises.

        Raises:
            OSError, RuntimeError, ValueError, SafetensorError: there are none, or one cannot be
                read.
        """
        self._folder = folder
        try:
            self._index = ShardedTensorIndex.from_disk(str(folder))
        except (KeyError, TypeError, AttributeError) as error:  # what mergekit makes of an index
            raise ValueError(f"the index has no usable weight_map ({error})") from error
        for shard in self._index.shards:
            _check_shard(folder, shard, self._index.is_safetensors)

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._index.tensor_paths)

    def __contains__(self, name: str) -> bool:
        return name in self._index.tensor_paths

    def get(self, name: str) -> Tensor:
        """Return a tensor on the CPU, mapped where its file allows it.

        Raises:
            KeyError: there is none of that name.
        """
        file_name = self._index.tensor_paths[name]
        stored: Tensor
        if self._index.is_safetensors:
            with safe_open(self._folder / file_name, framework="pt") as file:
                stored = file.get_tensor(name)
        else:
            path = self._folder / file_name
            # Files of torch before 1.6 are no archives, and cannot be mapped.
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
            stored = saved.get("state_dict", saved)[name]
        return stored

    def size(self, dtype: torch.dtype) -> int:
        """Return the bytes that all tensors take in ``dtype``; reads headers only."""
        if not self._index.is_safetensors:
            stored = self.get(next(iter(self._index.tensor_paths))).itemsize
            return self.bytes_on_disk() * dtype.itemsize // stored
        count = 0
        for shard in self._index.shards:
            with safe_open(self._folder / shard.filename, framework="pt") as file:
                for name in shard.contained_keys:
                    count += torch.Size(file.get_slice(name).get_shape()).numel()
        return count * dtype.itemsize

    def bytes_on_disk(self) -> int:
        """Return the size of the files."""
        return sum((self._folder / shard.filename).stat().st_size for shard in self._index.shards)


def open_tensors(model: str, folder: Path) -> CheckpointTensors:
    """Open the files in ``folder``; ``model`` is what the user wrote, for the message.

    Raises:
        InputError: there are none that mergekit reads, or one is damaged or absent.
    """
    try:
        return CheckpointTensors(folder)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(
            f"model {model}: its weights cannot be read ({first_line(error)}); "
            "copy or download it again"
        ) from error


def _check_shard(folder: Path, shard: ShardInfo, is_safetensors: bool) -> None:
    if not isinstance(shard.filename, str) or Path(shard.filename).name != shard.filename:
        raise ValueError(f"the index names {shard.filename!r}: no file of the directory")
    path = folder / shard.filename
    if not is_safetensors:
        path.stat()
        return
    with safe_open(path, framework="pt") as file:
        missing = set(shard.contained_keys).difference(file.keys())
    if missing:
        raise ValueError(f"{shard.filename} does not hold {min(missing)}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
