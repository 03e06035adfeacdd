"""Everything that a calibration can be told. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_DATASET = "mit-han-lab/pile-val-backup"
"""The AIM authors' calibration data, split ``validation``."""

STATISTICS = ("importance", "subspace")
"""What can be measured: for AIM and for ARM."""


@dataclass(frozen=True)
class CalibrationOptions:
    """The arguments and options of ``mergekit-arm calibrate``; see its ``--help``."""

    model: str
    out: str
    dataset: str = DEFAULT_DATASET
    subset: str | None = None
    split: str | None = None
    text_column: str | None = None
    samples: int = 256
    sequence_length: int = 512
    batch_size: int | None = None
    seed: int = 42
    device: str = "auto"
    dtype: str = "auto"
    statistics: tuple[str, ...] = STATISTICS
    rank: int | None = None
    energy: float = 0.97
    subspace_tokens: int = 16384
    skip_first: int = 0
    keep_sketch: bool = False
    trust_remote_code: bool = False
    lora_merge_cache: str | None = None
    force: bool = False
