"""The tables of ``mergekit-arm inspect``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table

from mergekit_arm.inspecting.comparison import Comparison
from mergekit_arm.inspecting.summary import InputFacts, Summary
from mergekit_arm.inspecting.tensor import TensorFacts
from mergekit_arm.units import size_text

_SHOWN = 5


def summary_tables(summary: Summary) -> Iterator[RenderableType]:
    """Yield what a directory is, which inputs are most unequal, and which subspaces hold least."""
    yield _provenance(summary)
    if summary.skewed:
        peaks = summary.skewed[:_SHOWN]
        yield _inputs("Most unequal inputs", peaks, "largest / mean", "top 1 % holds", _skew)
    if summary.subspaces:
        least = summary.subspaces[:_SHOWN]
        yield _inputs("Subspaces that hold least", least, "directions", "energy", _subspace)


def tensor_table(facts: TensorFacts) -> Table:
    """Return what a directory says of one weight."""
    record = facts.record
    table = Table(title=escape(facts.name), title_justify="left", show_header=False)
    table.add_row("shape", f"{record.shape} {record.dtype}")
    if record.site is None:
        table.add_row("not measured", str(record.reason))
        return table
    row = "" if record.row is None else f", row {record.row}"
    table.add_row("input", f"{escape(record.site)}{row}, along axis {record.input_axis}")
    table.add_row("tokens", f"{facts.tokens:,}")
    if facts.shared:
        more = f" and {len(facts.shared) - _SHOWN} more" if facts.shared[_SHOWN:] else ""
        table.add_row("shared with", escape(", ".join(facts.shared[:_SHOWN])) + more)
    if facts.peak is not None:
        table.add_row("importance", f"largest / mean {facts.peak:.1f}, top 1 % of the channels "
                      f"hold {facts.held:.1%}")  # fmt: skip
        top = ", ".join(f"{channel} ({value:.4g})" for channel, value in facts.channels)
        table.add_row("top channels", f"{top}: mean |x|")
    if facts.rank is not None:
        held = "" if facts.energy is None else f" hold {facts.energy:.1%} of the second moment"
        table.add_row("subspace", f"{facts.rank} directions{held}")
        table.add_row("the first hold", ", ".join(f"{share:.1%}" for share in facts.leading))
    return table


def comparison_tables(comparison: Comparison) -> Iterator[RenderableType]:
    """Yield whether two directories are of one model, what else differs, and the layers."""
    one, other = map(escape, comparison.references)
    head = Table(title=f"{one} and {other}", title_justify="left", show_header=False)
    common, same = comparison.same_weights
    verdict = (
        "yes" if comparison.same_model else f"no: {same} of {common} weights have the same values"
    )
    head.add_row("same model", verdict, style=None if comparison.same_model else "yellow")
    for name, values in comparison.differences.items():
        head.add_row(name, escape(f"{_short(values[0])} | {_short(values[1])}"))
    head.add_row("inputs", f"{len(comparison.inputs)} that both have measured")
    yield head
    table = Table(title="By layer", title_justify="left")
    columns = ("layer", "inputs", "correlation", "of ranks", "overlap", "mean angle", "largest")
    for column in columns:
        table.add_column(column, justify="right")
    for layer in comparison.layers():
        table.add_row(
            "others" if layer.layer is None else str(layer.layer),
            str(layer.inputs),
            _number(layer.correlation, ".4f"),
            _number(layer.ranks, ".4f"),
            _number(layer.overlap, ".4f"),
            _number(layer.mean_angle, ".1f", "°"),
            _number(layer.largest_angle, ".1f", "°"),
        )
    yield table


def _provenance(summary: Summary) -> Table:
    metadata = summary.metadata
    model, data, settings = metadata.model, metadata.data, metadata.settings
    table = Table(title=escape(summary.reference), title_justify="left", show_header=False)
    revision = f"@{model.revision[:12]}" if model.revision else ""
    table.add_row("model", escape(f"{model.reference}{revision}"))
    table.add_row("", f"{model.architecture}, content {model.content_hash[:16]}")
    split = f", split {data.split}" if data.split else ""
    table.add_row("data", escape(f"{data.dataset}{split}, column {data.column}"))
    seed = "several" if data.seed is None else data.seed
    table.add_row("measured", f"{data.sequences:,} sequences, {data.tokens:,} tokens, seed {seed}")
    table.add_row("", f"in {settings.dtype} on {settings.device}")
    table.add_row("statistics", ", ".join(settings.statistics))
    table.add_row("coverage", f"{summary.measured} of {summary.weights} weights at "
                  f"{len(summary.inputs)} inputs")  # fmt: skip
    for reason, count in summary.reasons.items():
        table.add_row("not measured", f"{count} weights: {reason}")
    if summary.experts:
        names = ", ".join(f"{name} ({n:,})" for name, n in list(summary.starved.items())[:_SHOWN])
        more = ", …" if len(summary.starved) > _SHOWN else ""
        text = f"{summary.experts}, of which {len(summary.starved)} saw too few tokens"
        starved = f": {escape(names)}{more}" if names else ""
        table.add_row("experts", text + starved, style="yellow" if names else None)
    if summary.subspaces:
        least, middle, most = summary.ranks()
        table.add_row("directions", f"{least} to {most}, median {middle:g}")
    table.add_row("size", size_text(summary.size))
    versions = ", ".join(f"{name} {number}" for name, number in metadata.versions.items())
    table.add_row("made with", versions)
    return table


def _inputs(title: str, inputs: list[InputFacts], first: str, second: str, cells: Any) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("input", overflow="fold")
    table.add_column("channels", justify="right")
    table.add_column(first, justify="right")
    table.add_column(second, justify="right")
    for one in inputs:
        table.add_row(escape(one.site), str(one.width), *cells(one))
    return table


def _skew(one: InputFacts) -> tuple[str, str]:
    return f"{one.peak:.1f}", f"{one.held:.1%}"


def _subspace(one: InputFacts) -> tuple[str, str]:
    return str(one.rank), f"{one.energy:.1%}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:16]}…"
