"""The checkpoint's tensors: fetched, sized, and read one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from zipfile import is_zipfile

import torch
import transformers
from accelerate import init_empty_weights
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from mergekit_arm.calibration.calls import NotWalkable
from mergekit_arm.calibration.model import Source, model_class, prepare, unloadable
from mergekit_arm.calibration.names import map_checkpoint
from mergekit_arm.errors import InputError, first_line

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


class LayerWeights:
    """Gives a model without weights those of one part at a time, as transformers would load them.

    transformers' own loading does the work (renamings, fused experts, dtypes), on the tensors of
    one part of the checkpoint.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: BriefLoader,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._device = device
        # Loading replaces parameters; these come back, so that what is tied stays tied.
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._sources: dict[str, list[str]] = defaultdict(list)
        for entry in map_checkpoint(model, sorted(checkpoint.index.tensor_paths)):
            if entry.parameter is not None:
                self._sources[entry.parameter].append(entry.name)
        self._settings = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=get_model_conversion_mapping(model),
        )

    def load(self, module: str, *, inner: bool) -> int:
        """Read the weights of the module of that name, with those of modules in it if ``inner``.

        Returns their bytes.

        Raises:
            NotWalkable: one of them is not in the checkpoint under its own name.
        """
        names = self._parameters(module, inner)
        wanted = {
            source: _Unread(self._checkpoint, source)
            for name in self._sources
            if self._belongs(name, module, inner)
            for source in self._sources[name]
        }
        with _quiet():
            found, _ = convert_and_load_state_dict_in_model(self._model, wanted, self._settings)
        if found.conversion_errors or found.mismatched_keys:
            problem = [*found.conversion_errors, *map(str, found.mismatched_keys)][0]
            raise NotWalkable(f"{problem} does not fit the model")
        size = 0
        for name in names:
            parameter = self._model.get_parameter(name)
            if parameter.is_meta:
                raise NotWalkable(f"{name} is not in the checkpoint under that name")
            size += parameter.nbytes
        return size

    def unload(self, module: str, *, inner: bool) -> None:
        """Let go of what ``load`` has read."""
        for name in self._parameters(module, inner):
            owner, _, own = name.rpartition(".")
            self._model.get_submodule(owner)._parameters[own] = self._empty[name]

    def blank(self, module: str) -> None:
        """Give a module zeros that take no memory for weights."""
        owner = self._model.get_submodule(module)
        for name in self._parameters(module, inner=False):
            like = self._empty[name]
            zero = torch.zeros((), dtype=like.dtype, device=self._device)
            own = name.rpartition(".")[2]
            owner._parameters[own] = nn.Parameter(zero.expand(like.shape), requires_grad=False)

    def _parameters(self, module: str, inner: bool) -> list[str]:
        return [name for name in self._empty if self._belongs(name, module, inner)]

    @staticmethod
    def _belongs(name: str, module: str, inner: bool) -> bool:
        return name.startswith(f"{module}.") if inner else name.rpartition(".")[0] == module


class _Unread:
    """A tensor that is read when transformers takes it, by ``[...]``."""

    def __init__(self, checkpoint: BriefLoader, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name

    def __getitem__(self, everything: object) -> Tensor:
        return self._checkpoint.get_tensor(self._name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from drawing a progress bar for every layer."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def empty_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model without its weights, which take no memory; buffers are real.

    Raises:
        InputError: transformers cannot make it.
    """
    try:
        with init_empty_weights(include_buffers=False):
            loader = model_class(source)
            model: PreTrainedModel = (
                loader._from_config(source.config, dtype=dtype)
                if issubclass(loader, PreTrainedModel)
                else loader.from_config(
                    source.config, dtype=dtype, trust_remote_code=source.trust_remote_code
                )
            )
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise InputError(unloadable(source.reference, error)) from error
    model.tie_weights()  # what was tied has become separate on the way
    return prepare(model)
