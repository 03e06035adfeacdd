"""Disk and memory that a checked merge takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergekit.common import ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_arm.checking.findings import Findings
from mergekit_arm.checking.models import Header, Model
from mergekit_arm.checking.planning import Planned
from mergekit_arm.files import try_writing
from mergekit_arm.merging.room import Room, room_in

_COPIES = 3
"""Of a tensor beside its inputs, in float32: differences, their sum, the result."""


def estimate(
    config: MergeConfiguration,
    models: Mapping[ModelReference, Model],
    planned: Iterable[Planned],
    out: Path,
    options: MergeOptions,
) -> Room:
    """Return what a merge takes into ``out``; tensors that mergekit converts are left out."""
    total, largest = 0, 0
    for one in planned:
        headers = [
            header
            for model, weight in one.inputs.items()
            if (header := _header(models[model], weight.name)) is not None
        ]
        if one.task is None or not headers:
            continue
        numbers = math.prod(headers[0].shape)
        inputs = sum(_bytes(config.dtype, header) for header in headers)
        total += numbers * _bytes(config.out_dtype or config.dtype, headers[0])
        largest = max(largest, numbers * (inputs + _COPIES * 4))
    return room_in(out, total, largest + min(total, options.out_shard_size))


def check_room(room: Room, out: Path, findings: Findings) -> None:
    """Find too little disk or memory, and a place that cannot be written."""
    try_writing(out / "config.json", "give another --out")
    if room.disk > room.disk_free:
        findings.error((), f"{out} has too little disk: {room}; give another directory with --out")
    if room.memory > room.memory_free:
        findings.note((), f"memory may run out: {room}; lower mergekit-yaml's --out-shard-size")


def _header(model: Model, name: str) -> Header | None:
    return model.headers.get(name)


def _bytes(dtype: str | None, header: Header) -> int:
    chosen = dtype_from_name(dtype) if dtype else None
    return (chosen or header.dtype).itemsize
