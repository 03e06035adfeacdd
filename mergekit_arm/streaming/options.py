"""How a stream is run, as against what it computes, which is ``config``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mergekit.options import MergeOptions

Keep = Literal["all", "best", "last"]
"""Which steps' float32 weights stay in ``steps/`` after the stream."""


@dataclass(frozen=True)
class WatchOptions:
    """How a training run is followed."""

    end_marker: str | None = None
    """A file that appears when the run ends; default: ``stream.end`` in its directory."""
    timeout: float = 3600.0
    """Seconds without a new checkpoint after which the run counts as ended."""
    poll: float = 2.0
    """Seconds between looks at the directory. Two must find the same of a checkpoint without
    trainer_state.json."""
    fed: bool = False
    """A training process puts the checkpoints into OUT, and says on standard input when it ends."""


@dataclass(frozen=True)
class StreamOptions:
    """Everything that a stream can be told beside its configuration."""

    merge: MergeOptions = field(default_factory=MergeOptions)
    """mergekit's own options, for every merge."""
    keep: Keep = "last"
    watch: WatchOptions | None = None
    """Follow a training run that is still going."""
    finish: bool = False
    """Make no further step; make the model of what there is."""
    strict: bool = False
    """End at a checkpoint that cannot be merged, instead of skipping it."""
