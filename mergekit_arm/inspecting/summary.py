"""A whole statistics directory: what was measured, on what, how completely, and what stands out."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from mergekit_arm.inspecting.inputs import layer_of, mean_abs, skew
from mergekit_arm.statistics.format import Metadata
from mergekit_arm.statistics.read import Statistics


@dataclass(frozen=True)
class InputFacts:
    """One measured input."""

    site: str
    layer: int | None
    width: int
    tokens: int
    """Of experts, all of theirs together."""
    peak: float | None
    """Its largest mean |x| over the mean of all channels; None without importance."""
    held: float | None
    """Share of Σ mean |x| that the largest hundredth of the channels hold."""
    rank: int | None
    """Stored directions of its subspace, where there is one."""
    energy: float | None
    """Share of the second moment that they hold."""


@dataclass(frozen=True)
class Summary:
    """A statistics directory."""

    reference: str
    metadata: Metadata
    size: int
    """Bytes of its tensor files."""
    measured: int
    """Weights that have statistics."""
    reasons: dict[str, int]
    """Why others have none, and how many."""
    experts: int
    starved: dict[str, int]
    """Experts that saw too few tokens, and how many they saw."""
    inputs: list[InputFacts]
    """In the order of the forward pass."""

    @property
    def skewed(self) -> list[InputFacts]:
        """The inputs, the one with the highest peak first."""
        known = [one for one in self.inputs if one.peak is not None]
        return sorted(known, key=lambda one: -(one.peak or 0.0))

    @property
    def subspaces(self) -> list[InputFacts]:
        """The inputs that have a subspace, the one that holds least first."""
        known = [one for one in self.inputs if one.energy is not None]
        return sorted(known, key=lambda one: one.energy or 0.0)

    def ranks(self) -> tuple[int, float, int]:
        """Return the least, median and greatest number of stored directions."""
        ranks = [one.rank for one in self.subspaces if one.rank is not None]
        return min(ranks), median(ranks), max(ranks)

    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        facts = self.metadata.model_dump(
            mode="json", include={"model", "data", "settings", "versions"}, exclude_none=True
        )
        coverage = {"measured": self.measured, "weights": self.weights, "reasons": self.reasons}
        experts = {"count": self.experts, "starved": self.starved}
        return {
            "reference": self.reference,
            **facts,
            "bytes": self.size,
            "coverage": coverage,
            "experts": experts,
            "inputs": [asdict(one) for one in self.inputs],
        }

    @property
    def weights(self) -> int:
        """How many tensors the checkpoint has."""
        return len(self.metadata.weights)


def summarise(statistics: Statistics) -> Summary:
    """Read a directory, one input at a time.

    Raises:
        InputError: it is damaged.
    """
    metadata = statistics.metadata
    weights = metadata.weights.values()
    few = max(metadata.settings.min_expert_tokens, 1)
    experts = metadata.experts()
    return Summary(
        reference=statistics.reference,
        metadata=metadata,
        size=statistics.stored_bytes,
        measured=sum(1 for one in weights if one.site),
        reasons=dict(sorted(Counter(one.reason for one in weights if one.reason).items())),
        experts=len(experts),
        starved={name: tokens for name, tokens in sorted(experts.items()) if tokens < few},
        inputs=[_input(statistics, site) for site in metadata.sites],
    )


def _input(statistics: Statistics, site: str) -> InputFacts:
    record = statistics.metadata.sites[site]
    values = mean_abs(statistics, site)
    peak, held = (None, None) if values is None else skew(values)
    return InputFacts(
        site=site,
        layer=layer_of(site),
        width=record.width,
        tokens=sum(record.tokens) if isinstance(record.tokens, list) else record.tokens,
        peak=peak,
        held=held,
        rank=record.subspace,
        energy=record.energy,
    )
