"""The statistics of a step: measured on the current model, or carried over from an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.options import MergeOptions
from torch import Tensor

from mergekit_arm.calibration.calibrate import calibrate
from mergekit_arm.calibration.options import CalibrationOptions
from mergekit_arm.errors import InputError
from mergekit_arm.sections import section
from mergekit_arm.statistics.card import statistics_card
from mergekit_arm.statistics.format import METADATA_FILE, Metadata, WeightRecord
from mergekit_arm.statistics.locate import read_metadata
from mergekit_arm.statistics.probe import content_hash, take_probe
from mergekit_arm.statistics.read import Statistics
from mergekit_arm.statistics.write import PROBES, write_statistics


@dataclass(frozen=True)
class Measurement:
    """A statistics directory and where its numbers come from."""

    path: Path
    measured_at: int
    """The step whose starting model was measured."""
    tokens: int


def measure_model(
    model: str,
    out: Path,
    step: int,
    settings: Mapping[str, Any],
    statistics: tuple[str, ...],
    merge: MergeOptions,
    *,
    say: Callable[[str], None],
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Calibrate ``model`` into ``out``, or find it done there already.

    Raises:
        InputError: what ``calibrate`` refuses.
    """
    if not (out / METADATA_FILE).is_file():
        options = CalibrationOptions(
            model=model,
            out=str(out),
            statistics=statistics,
            trust_remote_code=merge.trust_remote_code,
            lora_merge_cache=merge.lora_merge_cache,
            **settings,
        )
        with section("calibration"):
            calibrate(options, progress, say)
    return Measurement(out, step, read_metadata(str(out), out).data.tokens)


def carry_over(earlier: Path, measured_at: int, model: Path, out: Path) -> Measurement:
    """Write the statistics at ``earlier`` to ``out`` as those of ``model``, or find it done there.

    The sums stay; the probes become ``model``'s, by which the merge recognises it. That is what
    ``refresh: once`` means: the subspaces and importances of an earlier model of this stream
    steer the update of a later one. Holds no more than the probes.

    Raises:
        InputError: the model has a weight of which ``earlier`` knows nothing.
    """
    if not (out / METADATA_FILE).is_file():
        old = read_metadata(str(earlier), earlier)
        current = LazyTensorLoader.from_disk(str(model))
        weights, probes = _bind(old, current)
        content = content_hash(
            (name, weight.shape, weight.dtype, probe)
            for (name, weight), probe in zip(weights.items(), probes, strict=True)
        )
        record = old.model.model_copy(update={"content_hash": content, "revision": None})
        new = old.model_copy(update={"model": record, "weights": weights})
        source = Statistics(str(earlier), earlier)
        tensors: dict[str, Tensor] = {name: source.stored(name) for name in source.names}
        tensors[PROBES] = probes
        write_statistics(out, new, tensors, statistics_card(new, out.name))
    return Measurement(out, measured_at, read_metadata(str(out), out).data.tokens)


def provenance(measurement: Measurement) -> dict[str, Any]:
    """Return what the numbers were measured on and with, without the list of weights."""
    metadata = read_metadata(str(measurement.path), measurement.path).model_dump(
        mode="json", include={"model", "data", "settings", "versions"}, exclude_none=True
    )
    return {"measured_before_step": measurement.measured_at, **metadata}


def _bind(old: Metadata, current: LazyTensorLoader) -> tuple[dict[str, WeightRecord], Tensor]:
    weights: dict[str, WeightRecord] = {}
    probes: list[Tensor] = []
    for name in sorted(current.index.tensor_paths):
        tensor = current.get_tensor(name)
        if not tensor.numel():
            continue
        record = old.weights.get(_known_name(name, old))
        if record is None or record.shape[1:] != list(tensor.shape)[1:]:
            raise InputError(
                f"{name}: refresh: once cannot carry statistics over, for the measured model had "
                "no such weight; set calibration: {refresh: every}"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        weights[name] = record.model_copy(
            update={"probe": len(probes), "dtype": dtype, "shape": list(tensor.shape)}
        )
        probes.append(take_probe(tensor))
    return weights, torch.stack(probes)


def _known_name(name: str, old: Metadata) -> str:
    """Return the measured weight's name: mergekit may add or drop a prefix of the base's."""
    if name in old.weights:
        return name
    alike = [o for o in old.weights if o.endswith(f".{name}") or name.endswith(f".{o}")]
    return alike[0] if len(alike) == 1 else name
