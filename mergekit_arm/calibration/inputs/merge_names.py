"""The names under which a merge asks for a model's tensors, where they are not the checkpoint's.

mergekit asks by the names in its architecture files, or, for a model it has no file for, by
transformers' own. It makes what a checkpoint stores in another layout on the way: one fused
tensor from many experts. Its own functions say here what it would get.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from mergekit.architecture import arch_info_for_config
from mergekit.architecture.conversion import convert_checkpoint_tensors
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_arm.calibration.inputs.coverage import Coverage, CoveredWeight
from mergekit_arm.models.conversion import Part
from mergekit_arm.models.tensors import CheckpointTensors, dtype_name
from mergekit_arm.statistics.probe import take_probe

LOG = logging.getLogger(__name__)


def add_asked_names(
    coverage: Coverage, model: PreTrainedModel, checkpoint: CheckpointTensors, config: Any
) -> None:
    """Add to ``coverage`` the aliases and the converted tensors that a merge may ask for.

    Holds one converted tensor at a time.
    """
    first_name = {id(p): name for name, p in model.named_parameters()}
    whole: dict[str, str] = {}
    pieces: dict[str, list[CoveredWeight]] = defaultdict(list)
    for weight in coverage.weights:
        for part in weight.parts:
            if part.converted:
                pieces[part.parameter].append(weight)
            else:
                whole.setdefault(part.parameter, weight.name)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = first_name[id(parameter)]
        if name in checkpoint:
            continue
        if own in whole:
            coverage.aliases[name] = whole[own]
        elif own in pieces and name == own:
            _add_converted(coverage, checkpoint, config.model_type, name, pieces[own])
    known = {weight.name for weight in (*coverage.weights, *coverage.converted)}
    known |= set(coverage.aliases)
    for name, others in _architecture_names(config):
        source = next((other for other in others if other in known), None)
        if name not in known and source is not None:
            coverage.aliases[name] = coverage.aliases.get(source, source)


def _add_converted(
    coverage: Coverage,
    checkpoint: CheckpointTensors,
    model_type: str,
    name: str,
    pieces: list[CoveredWeight],
) -> None:
    def load(piece: str) -> Callable[[], Tensor]:
        return lambda: checkpoint.get(piece)

    sources = {piece.name: load(piece.name) for piece in pieces}
    tensor = convert_checkpoint_tensors(model_type, sources, name)
    if tensor is None:
        return
    whole = Part(name, tuple(range(tensor.ndim)))
    weight = CoveredWeight(name, tuple(tensor.shape), dtype_name(tensor.dtype), (whole,))
    coverage.converted.append(weight)
    coverage.taken.append(take_probe(tensor))


def _architecture_names(config: Any) -> list[tuple[str, tuple[str, ...]]]:
    """Return the names in mergekit's architecture file, with what it accepts in their place."""
    architecture = arch_info_for_config(config)
    if architecture is None:
        return []
    try:
        weights = architecture.all_weights(config)
    except RuntimeError as error:
        # mergekit cannot plan a merge of this configuration either, and will say why.
        LOG.info("mergekit has no tensor names for this configuration: %s", error)
        return []
    return [(w.name, (*(w.aliases or ()), *(w.tied_names or ()))) for w in weights]
