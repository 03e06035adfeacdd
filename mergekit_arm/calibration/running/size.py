"""How large a statistics directory becomes at most, known when one block has gone through."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from transformers import PreTrainedModel

from mergekit_arm.calibration.inputs.coverage import Coverage
from mergekit_arm.calibration.inputs.readings import Parameter, SitePlan
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.sums.sites import Site, chosen_kinds, measured_input
from mergekit_arm.data.blocks import Corpus
from mergekit_arm.statistics.kinds.base import MeasuredInput

_FIXED_TEXT = 20_000
"""Bytes of the model card, and of what the metadata say of model, data and settings."""
_TEXT = 800
"""Bytes that a weight takes in the metadata and in the safetensors header, without its name."""
_NAMED = 12
"""How often the metadata and the headers hold a weight's name at most.

A site bears the name of one of its weights, and so does every tensor that is stored of it.
"""


def directory_bytes(
    sites: Iterable[Site],
    coverage: Coverage,
    corpus: Corpus,
    options: CalibrationOptions,
    *,
    repeated: int = 1,
    beyond: int = 0,
) -> int:
    """Return a bound of the bytes that a directory takes.

    Args:
        sites: through which the first block has gone.
        coverage: of the model.
        corpus: all that will be measured.
        options: of the run.
        repeated: how many times ``sites`` occur, with other names.
        beyond: bytes of tensors of other sites.
    """
    sites = list(sites)
    weights = [*coverage.weights, *coverage.converted]
    text = sum(_TEXT + _NAMED * len(weight.name) for weight in weights) + _FIXED_TEXT
    tensors = repeated * _site_bytes(sites) + beyond
    wanted = {(kind, site.plan.width) for site in sites for kind in site.here}
    shared = sum(kind.shared_bytes(width) for kind, width in wanted)
    return tensors + shared + coverage.probes.nbytes + corpus.rows.nbytes + text


def parameter_bytes(
    parameters: Iterable[Parameter],
    coverage: Coverage,
    model: PreTrainedModel,
    options: CalibrationOptions,
) -> int:
    """Return a bound of what the inputs of ``parameters`` take, which nothing has reached yet."""
    plan, head = coverage.plan, model.get_output_embeddings()
    kinds = chosen_kinds(options)
    found = 0
    for parameter in parameters:
        if parameter.name in plan.reasons:
            continue
        reading, shape = plan.readings.get(parameter.name), parameter.tensor.shape
        if reading:
            possible = [measured_input(SitePlan([reading]), head)]
        else:  # which axis is read is not known, nor whether others are experts
            width, count = max(shape[-2:], default=1), math.prod(shape[:-2])
            possible = [MeasuredInput(width), MeasuredInput(width, experts=count)]
        for kind in kinds:
            # A width of its own would bring shared tensors of its own.
            found += max(
                (source.experts or 1) * kind.stored_bytes(source.width)
                + kind.shared_bytes(source.width)
                if kind.left_out(source) is None
                else 0
                for source in possible
            )
    return found


def _site_bytes(sites: Iterable[Site]) -> int:
    """Return what finished ``sites`` take; experts without tokens yet are as large as others."""
    shares: dict[int, list[int]] = defaultdict(list)
    for site in sites:
        shares[id(site.plan)].append(site.result_bytes())
    return sum(len(sizes) * max(sizes) for sizes in shares.values())
