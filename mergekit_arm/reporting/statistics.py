"""The page on a statistics directory: what its numbers are, layer by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from mergekit_arm.inspecting.inputs import skew
from mergekit_arm.inspecting.summary import InputFacts, Summary, summarise
from mergekit_arm.methods.aim import gain
from mergekit_arm.reporting.drawings import Curve, Drawing, boxes, curves, heat_map, histogram
from mergekit_arm.reporting.page import Grid, Page
from mergekit_arm.reporting.places import LayerPlace, means, places
from mergekit_arm.reporting.spread import Spread
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics
from mergekit_arm.units import size_text

OMEGA = 0.4
"""AIM's default, for which factors are shown where no merge says another."""
_FACTOR = "factor"
_MOST = 10
"""Rows of a table of what stands out."""


def statistics_page(statistics: Statistics) -> Page:
    """Return the page; reads one input at a time.

    Raises:
        InputError: the directory is damaged.
    """
    summary = summarise(statistics)
    drawings, notes = [], []
    if IMPORTANCE.measured(statistics):
        drawings += list(_importance(statistics, summary))
    else:
        notes.append("Importance was not measured: no heat map and no relaxation factors.")
    if summary.subspaces:
        drawings += list(_subspaces(summary))
    else:
        notes.append("Subspaces were not measured: no energies.")
    if summary.starved:
        named = ", ".join(list(summary.starved)[:_MOST])
        notes.append(
            f"{len(summary.starved)} of {summary.experts} experts saw too few tokens to be used: "
            f"{named}{', …' if len(summary.starved) > _MOST else ''}"
        )
    return Page(
        title=f"Activation statistics of {summary.metadata.model.reference}",
        facts=_facts(summary),
        drawings=drawings,
        notes=notes,
        tables=list(_tables(summary)),
    )


def factor_drawings(spreads: dict[str, Spread], said: str) -> list[Drawing]:
    """Return how AIM's factors are distributed: in all, and by kind of weight.

    ``said``: whose factors they are, to begin the caption with.
    """
    total = Spread()
    for one in spreads.values():
        total.merge(one)
    how = (
        "The factor is 1 − (1 − ω) ā. 1: the channel keeps what the merge made of it; ω: it is the "
        "most active channel of its input, and is pulled back to the base the most. Over all input "
        "channels of all measured weights; the shares are on a logarithmic axis."
    )
    read = (
        "Boxes: the middle half of the channels, and their median; whiskers: from the 1st to the "
        "99th hundredth. Over all layers."
    )
    return [
        histogram("factors", "Relaxation factors of AIM", f"{said} {how}", total, _FACTOR),
        boxes(
            "factors-by-kind",
            "Relaxation factors by kind of weight",
            f"{said} {read}",
            spreads,
            _FACTOR,
        ),
    ]


def _importance(statistics: Statistics, summary: Summary) -> Iterator[Drawing]:
    metadata = statistics.metadata
    where = places(metadata.weights)
    loudness: dict[LayerPlace, list[float]] = defaultdict(list)
    unevenness: dict[LayerPlace, list[float]] = defaultdict(list)
    spreads: dict[str, Spread] = defaultdict(Spread)
    peaks = {one.site: one.peak for one in summary.inputs}
    measure = "mean_abs"
    order = {site: number for number, site in enumerate(metadata.sites)}
    measured = [(name, one) for name, one in metadata.weights.items() if one.site is not None]
    # As the forward pass goes; weights of one input follow each other, and it is read once.
    for name, record in sorted(measured, key=lambda one: order[one[1].site or ""]):
        assert record.site is not None  # those without are left out
        if not statistics.holds(record.site, "abs_sum"):
            measure = "rms"
        values = IMPORTANCE.values(statistics, record, measure)
        rows = values.reshape(-1, values.shape[-1])
        rows = rows[rows.sum(-1) > 0]  # an expert that saw too little has zeros
        if not len(rows):
            continue
        spreads[where[name].kind].add(gain(rows, OMEGA))
        loudness[where[name]].append(float(rows.mean()))
        peak = peaks[record.site]
        unevenness[where[name]].append(skew(rows)[0] if peak is None else peak)
    unit = "mean |x|" if measure == "mean_abs" else "√ mean x²"
    yield heat_map(
        "importance", "Importance by layer and kind of weight",
        f"The mean over the input channels of {unit}: how strongly the inputs of each weight are "
        "excited. Weights that read the same tensor (q, k, v; gate, up) have the same.",
        means(loudness), unit, logarithmic=True,
    )  # fmt: skip
    yield heat_map(
        "peaks", "How unequal the channels are",
        f"The most important input channel over the mean of all, by {unit}. Where it is high, AIM "
        "protects a few channels and hardly touches the others.",
        means(unevenness), "largest / mean", logarithmic=True,
    )  # fmt: skip
    yield from factor_drawings(
        spreads, f"What a merge with these statistics and ω = {OMEGA} (the default) multiplies "
        "each input channel's change with."
    )  # fmt: skip


def _subspaces(summary: Summary) -> Iterator[Drawing]:
    where = places(summary.metadata.sites)
    by_kind: dict[str, list[InputFacts]] = defaultdict(list)
    for one in summary.subspaces:
        if one.layer is not None:
            by_kind[where[one.site].kind].append(one)
    energies, ranks = [], []
    for kind, found in sorted(by_kind.items()):
        found.sort(key=lambda one: one.layer or 0)
        energies.append(Curve(kind, [(one.layer or 0, one.energy or 0.0) for one in found]))
        ranks.append(Curve(kind, [(one.layer or 0, (one.rank or 0) / one.width) for one in found]))
    wanted = summary.metadata.settings.energy
    asked = (
        ""
        if wanted is None
        else f" {wanted:g} was asked for; less is held where no more directions are stored."
    )
    yield curves(
        "energy", "Subspace energy by layer",
        f"The share of an input's second moment that its stored directions hold.{asked} Inputs "
        "that several weights read are named after one of them.",
        energies, "layer", "energy",
    )  # fmt: skip
    yield curves(
        "ranks", "Stored directions by layer",
        "Directions of each input's subspace, as a share of its channels: few where the inputs "
        "lie in a small subspace.",
        ranks, "layer", "directions / channels", from_zero=True,
    )  # fmt: skip


def _facts(summary: Summary) -> list[tuple[str, str]]:
    model, data, settings = summary.metadata.model, summary.metadata.data, summary.metadata.settings
    seed = "several" if data.seed is None else data.seed
    split = f", split {data.split}" if data.split else ""
    measured = f"{data.sequences:,} sequences, {data.tokens:,} tokens, seed {seed}"
    covered = f"{summary.measured} of {summary.weights} weights"
    return [
        ("directory", summary.reference),
        ("model", f"{model.reference}{f'@{model.revision}' if model.revision else ''}"),
        ("architecture", f"{model.architecture}, content {model.content_hash[:16]}"),
        ("data", f"{data.dataset}{split}, column {data.column}"),
        ("measured", f"{measured}, in {settings.dtype} on {settings.device}"),
        ("statistics", ", ".join(settings.statistics)),
        ("coverage", f"{covered} at {len(summary.inputs)} inputs"),
        *(("not measured", f"{n} weights: {reason}") for reason, n in summary.reasons.items()),
        ("size", size_text(summary.size)),
        ("made with", ", ".join(f"{name} {n}" for name, n in summary.metadata.versions.items())),
    ]


def _tables(summary: Summary) -> Iterator[Grid]:
    if summary.skewed:
        yield Grid(
            "Most unequal inputs",
            ("input", "channels", "largest / mean", "top 1 % holds"),
            [
                (one.site, str(one.width), f"{one.peak:.1f}", f"{one.held:.1%}")
                for one in summary.skewed[:_MOST]
            ],
        )
    if summary.subspaces:
        yield Grid(
            "Subspaces that hold least",
            ("input", "channels", "directions", "energy"),
            [
                (one.site, str(one.width), str(one.rank), f"{one.energy:.1%}")
                for one in summary.subspaces[:_MOST]
            ],
        )
