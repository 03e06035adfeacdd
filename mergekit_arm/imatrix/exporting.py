"""An importance matrix from statistics, for ``llama-quantize --imatrix``."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mergekit_arm.errors import InputError
from mergekit_arm.files import try_writing
from mergekit_arm.imatrix.files import Entry, ImportanceMatrix, read_imatrix, write_imatrix
from mergekit_arm.imatrix.names import LlamaNames
from mergekit_arm.inspecting.inputs import layer_of
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics

_CHUNK = 512
"""Tokens of a chunk, where the statistics know of none, as those of an older matrix."""
_Row = tuple[NDArray[np.float64], float, "NDArray[np.float64] | None"]


def export_imatrix(
    statistics: Statistics, out: str | Path, *, force: bool = False
) -> ImportanceMatrix:
    """Write what ``statistics`` know of every matrix's inputs to ``out``, and return it.

    Raises:
        InputError: they hold no importance, or are of a model that llama.cpp does not know, or
            ``out`` is there or cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise InputError(f"{out} is a directory; name a file, such as imatrix.gguf")
    _check_replaced(out, force)
    if not IMPORTANCE.measured(statistics):
        raise InputError(
            f"{statistics.reference} hold no importance: calibrate with --statistics importance"
        )
    matrix = to_matrix(statistics)
    try:
        try_writing(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_imatrix(out, matrix)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror}") from error
    return matrix


def _check_replaced(out: Path, force: bool) -> None:
    """Refuse to replace what is there without ``force``, and with it a model or any other file."""
    if not out.exists():
        return
    if not force:
        raise InputError(f"{out} exists; add --force to replace it, or choose another name")
    try:
        read_imatrix(out)
    except InputError as error:
        raise InputError(
            f"{out} exists and is no importance matrix; it will not be replaced: choose another "
            "name"
        ) from error


def to_matrix(statistics: Statistics) -> ImportanceMatrix:
    """Return the importance matrix of all weights that llama.cpp has names for.

    Raises:
        InputError: the architecture is not one of llama.cpp's.
    """
    metadata = statistics.metadata
    weights = metadata.weights
    layers = 1 + max((layer_of(name) or 0 for name in weights), default=0)
    names = LlamaNames(model_type(metadata.model.architecture), layers)
    rows: dict[str, dict[int, _Row]] = defaultdict(dict)
    for weight, record in weights.items():
        name = names.of(weight)
        if name is None or record.site is None or len(record.shape) < 2:
            continue
        found = _rows(statistics, record.site)
        if record.row is not None:
            rows[name.name][name.expert or 0] = found[record.row]
        elif name.expert is not None:
            rows[name.name][name.expert] = found[0]
        else:
            rows[name.name] = dict(enumerate(found))
    if not rows:
        raise InputError(f"{statistics.reference} are of no weight that llama.cpp has a name for")
    data = metadata.data
    mean = math.ceil(data.tokens / max(1, data.sequences))
    size = data.sequence_length or mean or _CHUNK
    return ImportanceMatrix(
        entries={name: _stack(found) for name, found in rows.items()},
        datasets=[data.dataset],
        chunks=math.ceil(data.tokens / size) or max(1, data.sequences),
        chunk_size=size,
    )


def model_type(architecture: str) -> str:
    """Return transformers' model type of a class such as ``LlamaForCausalLM``.

    Raises:
        InputError: it is no causal language model of transformers.
    """
    found = [n for n, known in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if known == architecture]
    # Several model types may share a class; the one that it is named after comes first.
    name = architecture.lower().removesuffix("forcausallm").removesuffix("lmheadmodel")
    found.sort(key=lambda one: one.replace("_", "") != name)
    if found:
        return str(found[0])
    raise InputError(f"{architecture} is no language model that llama.cpp quantises")


def _rows(statistics: Statistics, site: str) -> list[_Row]:
    """Return Σx², tokens and Σ|x| of an input, one for each expert."""
    tokens = statistics.metadata.sites[site].tokens
    squares = np.atleast_2d(statistics.tensor(site, "square_sum").double().numpy())
    counts = tokens if isinstance(tokens, list) else [tokens]
    absolute: list[NDArray[np.float64] | None] = [None] * len(counts)
    if statistics.holds(site, "abs_sum"):
        absolute = list(np.atleast_2d(statistics.tensor(site, "abs_sum").double().numpy()))
    return list(zip(squares, map(float, counts), absolute, strict=True))


def _stack(rows: dict[int, _Row]) -> Entry:
    """Stack experts' rows; one that saw nothing, and was not measured, counts nothing."""
    width = len(next(iter(rows.values()))[0])
    nothing: _Row = (np.zeros(width), 0.0, np.zeros(width))
    stacked = [rows.get(number, nothing) for number in range(max(rows) + 1)]
    known = all(absolute is not None for _, _, absolute in stacked)
    return Entry(
        np.stack([squares for squares, _, _ in stacked]),
        np.array([count for _, count, _ in stacked]),
        np.stack([one for _, _, one in stacked if one is not None]) if known else None,
    )
