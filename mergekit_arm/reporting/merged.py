"""The page on a merged model: how far every tensor went from the base, and what AIM held back."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration

from mergekit_arm.checking.document import Document, read_documents
from mergekit_arm.errors import InputError
from mergekit_arm.models.tensors import open_tensors
from mergekit_arm.reporting.drawings import BLUE, ORANGE, Curve, Drawing, curves, heat_map
from mergekit_arm.reporting.page import Grid, Page
from mergekit_arm.reporting.places import LayerPlace, means, places
from mergekit_arm.reporting.replay import Replay, TensorFate, fates_by_name, referenced
from mergekit_arm.reporting.spread import Spread
from mergekit_arm.reporting.statistics import factor_drawings
from mergekit_arm.reporting.stored import stored_models
from mergekit_arm.statistics.format import METADATA_FILE

CONFIG = "mergekit_config.yml"
_MOST = 10
_CHANGE = "‖ΔW‖ / ‖W‖"

Progress = Callable[[int, int], None]
"""Receives tensors done, and tensors in all."""


@dataclass
class _Found:
    """What is kept of the tensors: numbers, and counts of factors."""

    fates: list[TensorFate] = field(default_factory=list)
    """Without their factors."""
    spreads: dict[str, Spread] = field(default_factory=dict)
    """Of factors, by the name of the tensor's kind."""
    left_out: int = 0
    random: bool = False


def merged_page(out: Path, progress: Progress | None = None) -> Page:
    """Return the page on the merged model in ``out``.

    Takes about as long as the merge took where its inputs are here, since what AIM relaxed is
    merged once more. Relative paths in the configuration are looked for from the working directory.

    Raises:
        InputError: its configuration or weights cannot be read.
    """
    documents = read_documents(out / CONFIG)
    if len(documents) != 1 or not isinstance(documents[0].value, dict):
        raise InputError(f"{out / CONFIG}: it holds no configuration, so that nothing says what "
                         "was merged")  # fmt: skip
    (document,) = documents
    config = referenced(document)
    notes: list[str] = []
    found = _read(out, document, config, notes, progress or (lambda done, total: None))
    if found.left_out:
        notes.append(
            f"{found.left_out} tensors are not compared: the base has none of that name or shape, "
            "or they hold integers."
        )
    if found.random:
        notes.append(
            "The method that AIM wraps drops parameters at random. What it made before AIM is "
            "another draw here than in the merge: compare the two in size only."
        )
    return Page(
        title=f"A merge with {config.merge_method}: {out.resolve().name}",
        facts=list(_facts(out, config)),
        drawings=list(_drawings(found)),
        notes=notes,
        tables=list(_tables(found.fates)),
        listings=[(CONFIG, (out / CONFIG).read_text(encoding="utf-8"))],
    )


def _read(
    out: Path,
    document: Document,
    config: MergeConfiguration,
    notes: list[str],
    progress: Progress,
) -> _Found:
    merged = open_tensors(str(out), out)
    with stored_models(config.referenced_models()) as stored:
        why = f"this machine does not have all of {', '.join(stored.gone)}"
        if not stored.gone:
            try:
                replay = Replay(document, stored.folders)
            except InputError as error:
                why = f"the merge cannot be planned again ({error.message})"
            else:
                return _collect(replay.fates(merged), len(replay), progress)
        base = _base(config, stored.folders, notes, why)
        if base is None:
            return _Found()
        notes.append(
            f"Only the change from the base is drawn, since {why}. Nothing is said of what AIM "
            "relaxed or of angles: that takes all inputs and the statistics."
        )
        return _collect(fates_by_name(base, merged), len(merged.names), progress)


def _base(
    config: MergeConfiguration,
    folders: Mapping[ModelReference, Path],
    notes: list[str],
    why: str,
) -> Path | None:
    """Return the base's folder, where tensors of one name can be compared."""
    if config.base_model is None:
        notes.append(f"Nothing is drawn: the configuration names no base_model, and {why}.")
    elif config.base_model not in folders:
        notes.append(f"Nothing is drawn, since {why}.")
    elif config.slices or config.modules:
        notes.append(
            f"Nothing is drawn, since {why}, and slices may have given layers other numbers."
        )
    else:
        return folders[config.base_model]
    return None


def _collect(fates: Iterable[TensorFate | None], total: int, progress: Progress) -> _Found:
    found = _Found()
    for done, fate in enumerate(fates, 1):
        progress(done, total)
        if fate is None:
            found.left_out += 1
            continue
        if fate.factors is not None:
            found.spreads.setdefault(fate.name, Spread()).add(fate.factors)
        found.random = found.random or fate.random
        found.fates.append(TensorFate(fate.name, fate.base, fate.after, fate.before, fate.angle))
    return found


def _drawings(found: _Found) -> Iterator[Drawing]:
    fates = [one for one in found.fates if one.base > 0]
    where = places([one.name for one in found.fates])
    if not fates:
        return
    yield heat_map(
        "movement", "How far each tensor moved",
        f"{_CHANGE}, W the base's weight and ΔW the merged one's difference from it. "
        "The mean, where several tensors are of one layer and kind.",
        _cells(where, {one.name: one.after / one.base for one in fates}), _CHANGE, logarithmic=True,
    )  # fmt: skip
    if any(one.before is not None for one in fates):
        yield _by_layer(fates, where)
        kept = {one.name: one.after / one.before for one in fates if one.before}
        yield heat_map(
            "kept", "What AIM kept of each change",
            "‖ΔW‖ after AIM over ‖ΔW‖ before: 1 where AIM left the merge as it was.",
            _cells(where, kept), "after / before",
        )  # fmt: skip
    if found.spreads:
        by_kind: dict[str, Spread] = defaultdict(Spread)
        for name, spread in found.spreads.items():
            by_kind[where[name].kind].merge(spread)
        yield from factor_drawings(
            by_kind, "What this merge multiplied each input channel's change with."
        )
    angles = {one.name: one.angle for one in fates if one.angle is not None}
    if angles:
        yield heat_map(
            "angles", "Rotation angles",
            "The angle between ΔW and the mean of the input models' task vectors, of the matrices: "
            "0° where the merge went straight towards the models, 90° where it went elsewhere.",
            _cells(where, angles), "degrees",
        )  # fmt: skip


def _cells(
    where: Mapping[str, LayerPlace], values: Mapping[str, float]
) -> dict[tuple[str, int], float]:
    cells: dict[LayerPlace, list[float]] = defaultdict(list)
    for name, value in values.items():
        cells[where[name]].append(value)
    return means(cells)


def _by_layer(fates: list[TensorFate], where: Mapping[str, LayerPlace]) -> Drawing:
    def line(size: Callable[[TensorFate], float]) -> list[tuple[float, float]]:
        layers: dict[int, list[TensorFate]] = defaultdict(list)
        for one in fates:
            layer = where[one.name].layer
            if layer is not None and one.before is not None:
                layers[layer].append(one)
        return [
            (layer, math.hypot(*map(size, own)) / math.hypot(*(one.base for one in own)))
            for layer, own in sorted(layers.items())
        ]

    return curves(
        "before-and-after", "Change by layer, before and after AIM",
        f"{_CHANGE} over all weights of a layer: of what the wrapped method makes of the same "
        "inputs, merged once more for this page, and of the merged model.",
        [Curve("before AIM", line(lambda one: one.before or 0.0), ORANGE, "dash"),
         Curve("after AIM", line(lambda one: one.after), BLUE)],
        "layer", _CHANGE, from_zero=True,
    )  # fmt: skip


def _facts(out: Path, config: MergeConfiguration) -> Iterator[tuple[str, str]]:
    yield "directory", str(out)
    yield "method", config.merge_method
    yield "base", str(config.base_model or "none")
    inputs = [one for one in config.referenced_models() if one != config.base_model]
    yield "models", ", ".join(sorted(map(str, inputs)))
    for one in _statistics(out):
        model, data = one.get("model", {}), one.get("data", {})
        yield (
            "statistics",
            (
                f"{one.get('reference')}: of {model.get('reference')}, measured on "
                f"{data.get('tokens')} tokens of {data.get('dataset')}, digest "
                f"{str(one.get('digest'))[:16]}"
            ),
        )


def _statistics(out: Path) -> list[dict[str, Any]]:
    """Return what was left beside the merge on its statistics; nothing of what is not ours."""
    try:
        document = json.loads((out / METADATA_FILE).read_text(encoding="utf-8"))
        return [one for one in document["statistics"] if isinstance(one, dict)]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _tables(fates: list[TensorFate]) -> Iterator[Grid]:
    moved = sorted((one for one in fates if one.base > 0), key=lambda one: -one.after / one.base)
    if not moved:
        return
    before = any(one.before is not None for one in moved)
    yield Grid(
        "Tensors that moved most",
        ("tensor", _CHANGE, *(("before AIM",) if before else ())),
        [
            (
                one.name,
                f"{one.after / one.base:.4g}",
                *(
                    ("" if one.before is None else f"{one.before / one.base:.4g}",)
                    if before
                    else ()
                ),
            )
            for one in moved[:_MOST]
        ],
    )
