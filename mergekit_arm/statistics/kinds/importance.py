"""Importance: how strongly each input channel is excited, for AIM."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.format import SettingsRecord, WeightRecord
from mergekit_arm.statistics.kinds.base import Directory, Kind, Observer, TensorSpec

LOG = logging.getLogger(__name__)


class ImportanceSums(Observer):
    """Σ|x| and Σx² of every input channel (AIM, arXiv 2502.02421, section 3).

    Rows of one batch are summed in float32 and batches in float64: at 10⁷ tokens a float32
    running sum has lost digits (``tests/statistics/kinds/test_importance.py`` shows how many).
    Holds 2 × in float64 values and a scratch copy of the largest batch.
    """

    def update(self, x: Tensor) -> None:
        magnitude = x.abs() if x.dtype == torch.float32 else x.float().abs_()
        self.sums["abs_sum"] += magnitude.sum(0)
        self.sums["square_sum"] += magnitude.square_().sum(0)

    def checksum(self) -> Tensor:
        # Squares overflow before magnitudes do; an overflow is as useless as a NaN.
        return self.sums["square_sum"].sum()


@dataclass(frozen=True)
class Importance(Kind):
    """Σ|x| and Σx² of every channel, at every input, over all tokens."""

    name: ClassVar[str] = "importance"

    magnitudes: bool = True
    """Σ|x| is there as well: not so of what was imported from llama.cpp."""

    def settings(self) -> dict[str, Any]:
        return {} if self.magnitudes else {"magnitudes": False}

    def parameters(self, settings: SettingsRecord) -> dict[str, Any]:
        known = self.from_record(settings).get("magnitudes", True)
        return {} if known else {"importance": "rms"}

    def state(self, width: int) -> dict[str, TensorSpec]:
        one = TensorSpec(torch.float64, (width,))
        return {"abs_sum": one, "square_sum": one} if self.magnitudes else {"square_sum": one}

    def observer(self, width: int, device: torch.device) -> ImportanceSums:
        return ImportanceSums(self.state(width), device)

    def values(self, directory: Directory, record: WeightRecord, measure: str) -> Tensor:
        """Return the importance of the weight's input channels, float32, ≥ 0, unnormalised.

        Args:
            directory: open statistics.
            record: a measured weight (``record.site`` is set).
            measure: ``mean_abs`` (mean |x|, the AIM paper's) or ``rms`` (√ mean x²).

        Returns:
            ``(in,)``, or ``(experts, in)`` for a fused weight with one row for each expert.
            Rows of experts that saw fewer than the recorded minimum of tokens are zero.

        Raises:
            InputError: importance was not measured, or its sums are not finite.
        """
        assert record.site is not None
        site = record.site
        values = directory.once(
            (self.name, site, measure), lambda: self._read_values(directory, site, measure)
        )
        return values if record.row is None else values[record.row]

    def _read_values(self, directory: Directory, name: str, measure: str) -> Tensor:
        metadata = directory.metadata
        # With --multi-gpu, mergekit makes a GPU the default device.
        tokens = torch.tensor(metadata.sites[name].tokens, dtype=torch.float64, device="cpu")
        if measure == "mean_abs" and (
            directory.holds(name, "square_sum") and not directory.holds(name, "abs_sum")
        ):
            raise InputError(
                f"activation_stats {directory.reference}: they hold no mean |x|, only mean x², as "
                "importance matrices do: set importance: rms, or calibrate the model"
            )
        sums = directory.tensor(name, "abs_sum" if measure == "mean_abs" else "square_sum")
        values = sums.double() / tokens.clamp(min=1)[..., None]
        if measure == "rms":
            values = values.sqrt()
        if tokens.ndim:
            fewest = max(metadata.settings.min_expert_tokens, 1)
            starved = tokens < fewest
            values = values.masked_fill(starved[..., None], 0)
            if bool(starved.any()) and directory.first(("starved", name)):
                _warn_starved(name, starved, fewest)
        if not torch.isfinite(values).all():
            raise InputError(
                f"activation_stats {directory.reference}: values of {name} are not finite; "
                "measure it again"
            )
        return values.float()


def _warn_starved(site: str, starved: Tensor, fewest: int) -> None:
    experts = starved.nonzero().flatten().tolist()
    listed = ", ".join(map(str, experts[:8])) + (", …" if len(experts) > 8 else "")
    LOG.warning(
        "%s: %d of %d experts (%s) saw fewer than %d tokens, too few to be used: for them it is as "
        "if nothing had been measured",
        site,
        len(experts),
        len(starved),
        listed,
        fewest,
    )


IMPORTANCE = Importance()
