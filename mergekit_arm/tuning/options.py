"""How a search is run, as against what it searches, which is ``config``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mergekit.options import MergeOptions
from pydantic import ValidationError

from mergekit_arm.errors import InputError
from mergekit_arm.judging.sets import DTYPE
from mergekit_arm.sections import explain
from mergekit_arm.tuning.config import Sampler, TuningSettings


@dataclass(frozen=True)
class TuneOptions:
    """What a search can be told beside its file; None leaves what the file says."""

    merge: MergeOptions = field(default_factory=MergeOptions)
    """mergekit's own options, for every merge; its device also scores the models."""
    trials: int | None = None
    timeout: float | None = None
    """Seconds after which no trial begins."""
    sampler: Sampler | None = None
    seed: int | None = None
    dtype: DTYPE | None = None
    """Of the forward passes."""
    baseline: bool | None = None
    """Whether plain task arithmetic is tried."""
    model: bool = True
    """Whether the best merge is written to OUT/model."""
    force: bool = False
    """Whether another search at OUT is replaced."""

    def settings(self, written: TuningSettings) -> TuningSettings:
        """Return the file's settings with what was said beside it.

        Raises:
            InputError: what was said cannot be.
        """
        names = ("trials", "timeout", "sampler", "seed", "dtype", "baseline")
        said: dict[str, Any] = {
            name: getattr(self, name) for name in names if getattr(self, name) is not None
        }
        try:
            return TuningSettings.model_validate({**written.model_dump(), **said})
        except ValidationError as error:
            raise InputError(f"--{explain(error, {})}") from error
