"""A trial's model: merged straight into the parameters of the loaded one, or out of core."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
import transformers
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.graph import Executor
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import FinalizeModel, LoaderCache, SaveTensor
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_arm.errors import Failure, first_line
from mergekit_arm.files import remove
from mergekit_arm.judging.judge import Judge, empty_cache
from mergekit_arm.machine import free_memory
from mergekit_arm.merging.documents import to_yaml
from mergekit_arm.merging.merge import forget_plans, merge
from mergekit_arm.models.tensors import open_tensors
from mergekit_arm.tuning.sink import ParameterSink, SinkTask

KEPT_SHARE = 0.8
"""Of the free memory that inputs may take once the evaluated model is loaded."""


class KeptTensors(LazyTensorLoader):  # type: ignore[misc]  # mergekit is untyped
    """mergekit's loader of a model, which reads every tensor once and keeps it."""

    def __init__(self, loader: LazyTensorLoader) -> None:
        super().__init__(loader.index, loader.lazy_unpickle)
        self._kept: dict[tuple[str, str], Tensor] = {}

    def get_tensor(
        self,
        key: str,
        device: str = "cpu",
        aliases: list[str] | None = None,
        raise_on_missing: bool = True,
    ) -> Tensor | None:
        found = self._kept.get((key, device))
        if found is None:
            read = super().get_tensor(key, device, aliases, raise_on_missing)
            if read is None:
                return None
            # A copy: what safetensors returns is a view of the mapped file.
            found = self._kept[key, device] = read.clone()
        return found


class Workshop:
    """Makes the model of one trial after the other; one at a time exists.

    The first is merged to the disk by mergekit's ``run_merge`` and loaded as any model is. Later
    ones are merged into that model's parameters, where ``in_memory``; their bytes are the same.
    """

    def __init__(
        self, judge: Judge, options: MergeOptions, folder: Path, *, in_memory: bool = True
    ) -> None:
        """``folder``: for merged models on the disk, one at a time."""
        self._judge = judge
        self._options = options
        self.folder = folder
        self._in_memory = in_memory and not options.multi_gpu
        self._model: PreTrainedModel | None = None
        self._names: list[str] = []

    def model(self, document: Mapping[str, Any], *, on_disk: bool) -> PreTrainedModel | None:
        """Merge ``document``, and return the loaded model; None where no set needs it loaded.

        ``on_disk``: ``folder`` must hold it too, for the user's commands.

        Raises:
            click.ClickException: the merge or the model was refused.
            Failure: anything else that mergekit raised.
        """
        forget_plans()
        if self._model is not None and self._in_memory and not on_disk:
            self._merge_into(self._model, document)
            return self._model
        self.close()
        merge(document, to_yaml(document), self.folder, self._options)
        if not self._judge.has_data:
            return None
        self._model = self._judge.load(str(self.folder))
        self._names = open_tensors(str(self.folder), self.folder).names
        if not on_disk:
            remove(self.folder)
        if self._in_memory and not on_disk:
            self._keep_inputs(document)
        return self._model

    def close(self) -> None:
        """Free the model."""
        if self._model is not None:
            device = self._model.device
            self._model = None
            gc.collect()
            empty_cache(device)

    def _keep_inputs(self, document: Mapping[str, Any]) -> None:
        """Let mergekit keep what it reads of the inputs, if memory allows."""
        references = MergeConfiguration.model_validate(dict(document)).referenced_models()
        loaders = {one: LoaderCache().get(one) for one in references}
        size = sum(
            (Path(loader.index.base_path) / shard.filename).stat().st_size
            for loader in loaders.values()
            for shard in loader.index.shards
        )
        if self._options.read_to_gpu:
            return  # they would stay there, beside the evaluated model
        if size <= KEPT_SHARE * free_memory(torch.device("cpu")):
            for one, loader in loaders.items():
                if not isinstance(loader, KeptTensors):
                    LoaderCache.loaders[one] = KeptTensors(loader)

    def _merge_into(self, model: PreTrainedModel, document: Mapping[str, Any]) -> None:
        """Do what ``run_merge`` does, with the model's parameters in the place of files."""
        options = self._options
        configuration = MergeConfiguration.model_validate(dict(document))
        key = str(id(self))
        SinkTask.sinks[key] = ParameterSink(model, self._names)
        try:
            if options.random_seed is not None:
                transformers.trainer_utils.set_seed(options.random_seed)
            LoaderCache().setup(options=options)
            planned = MergePlanner(
                configuration,
                get_architecture_info(configuration, options),
                options=options,
                out_model_config=model.config,
            ).plan_to_disk(out_path=key)
            executor = Executor(
                targets=_into_parameters(planned, key),
                math_device=options.device,
                storage_device=options.device if options.low_cpu_memory else "cpu",
            )
            for _ in executor.run(quiet=True):
                pass
        except click.ClickException:
            raise
        except Exception as error:  # mergekit raises whatever its parts raise
            raise Failure(f"mergekit could not merge: {first_line(error)}") from error
        finally:
            del SinkTask.sinks[key]


def _into_parameters(planned: list[Any], key: str) -> list[Any]:
    """Return the tasks of a plan, in their order, with :class:`SinkTask` as their writer."""
    writer = SinkTask(out_path=key, max_shard_size=1)
    saves = [
        task.model_copy(update={"writer_task": writer})
        for task in planned
        if isinstance(task, SaveTensor)
    ]
    others = [task for task in planned if not isinstance(task, SaveTensor)]
    return saves + [
        task.model_copy(update={"writer_task": writer, "tensor_save_tasks": tuple(saves)})
        if isinstance(task, FinalizeModel)
        else task
        for task in others
    ]
