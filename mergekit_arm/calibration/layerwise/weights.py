"""The weights of one part of a model at a time, loaded as transformers would load them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from mergekit_arm.calibration.layerwise.calls import NotWalkable
from mergekit_arm.models.names import map_checkpoint
from mergekit_arm.models.tensors import CheckpointTensors


class LayerWeights:
    """Gives a model without weights those of one part at a time, as transformers would load them.

    transformers' own loading does the work (renamings, fused experts, dtypes), on the tensors of
    one part of the checkpoint.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: CheckpointTensors,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._device = device
        # Loading replaces parameters; these come back, so that what is tied stays tied.
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._sources: dict[str, list[str]] = defaultdict(list)
        for entry in map_checkpoint(model, checkpoint.names):
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
            # None is the plan for tensor parallelism, which transformers 5.13 asks for; newer
            # releases have in its place what lies on the disk, None too.
            found, _ = convert_and_load_state_dict_in_model(
                self._model, wanted, self._settings, None
            )
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

    def __init__(self, checkpoint: CheckpointTensors, name: str) -> None:
        self._checkpoint = checkpoint
        self._name = name

    def __getitem__(self, everything: object) -> Tensor:
        return self._checkpoint.get(self._name)


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
