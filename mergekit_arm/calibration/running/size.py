"""How large a statistics directory becomes at most, known when one block has gone through."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from transformers import PreTrainedModel

from mergekit_arm.calibration.inputs.coverage import Coverage
from mergekit_arm.calibration.inputs.readings import Parameter
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.calibration.sums.sites import Site
from mergekit_arm.data.blocks import Corpus
from mergekit_arm.statistics.kinds.subspace import sketch_matrix_bytes, stored_bytes

_IMPORTANCE = 16
"""Bytes for each channel: two float64 sums."""
_FIXED_TEXT = 20_000
"""Bytes of the model card, and of what the metadata say of model, data and settings."""
_TEXT = 800
"""Bytes that a weight takes in the metadata and in the safetensors header, without its name."""
_NAMED = 12
"""How often these hold its name at most: each tensor of its site begins with one."""


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
    matrices = 0
    if options.keep_sketch:
        widths = {site.plan.width for site in sites if "subspace" in site.statistics}
        matrices = sum(sketch_matrix_bytes(width, options.rank) for width in widths)
    return tensors + matrices + coverage.probes.nbytes + corpus.rows.nbytes + text


def parameter_bytes(
    parameters: Iterable[Parameter],
    coverage: Coverage,
    model: PreTrainedModel,
    options: CalibrationOptions,
) -> int:
    """Return a bound of what the inputs of ``parameters`` take, which nothing has reached yet."""
    plan, head = coverage.plan, model.get_output_embeddings()
    found = 0
    for parameter in parameters:
        if parameter.name in plan.reasons:
            continue
        reading, shape = plan.readings.get(parameter.name), parameter.tensor.shape
        if reading:
            width, count = reading.width, reading.experts or 1
        else:  # which axis is read is not known, nor whether others are experts
            width, count = max(shape[-2:], default=1), math.prod(shape[:-2])
        found += _IMPORTANCE * width * count
        rotated = reading is None or (
            reading.matrix
            and reading.experts is None
            and not any(layer is head for layer in reading.layers)
        )
        if rotated and "subspace" in options.statistics:
            found += stored_bytes(width, options.rank, keep_sketch=options.keep_sketch)
            # A width of its own would bring a matrix of its own.
            found += sketch_matrix_bytes(width, options.rank) if options.keep_sketch else 0
    return found


def _site_bytes(sites: Iterable[Site]) -> int:
    """Return what finished ``sites`` take; experts without tokens yet are as large as others."""
    shares: dict[int, list[int]] = defaultdict(list)
    for site in sites:
        shares[id(site.plan)].append(site.result_bytes())
    return sum(len(sizes) * max(sizes) for sizes in shares.values())
