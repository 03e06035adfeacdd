"""Everything that a calibration can be told. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mergekit_arm.data.settings import DEFAULT_DATASET, RECIPES, DataSettings
from mergekit_arm.errors import InputError


@dataclass(frozen=True)
class CalibrationOptions:
    """The arguments and options of ``mergekit-arm calibrate``; see its ``--help``."""

    model: str
    out: str
    dataset: str | tuple[str, ...] = DEFAULT_DATASET
    subset: str | None = None
    split: str | None = None
    text_column: str | None = None
    part: str | None = None
    samples: int = 256
    sequence_length: int = 512
    batch_size: int | None = None
    max_tokens_per_row: int | None = None
    recipe: str = RECIPES[0]
    tokenizer: str | None = None
    chat_template: str | None = None
    seed: int = 42
    device: str = "auto"
    device_map: str | None = None
    dtype: str = "auto"
    statistics: tuple[str, ...] = ("all",)
    """Names of kinds (``statistics/kinds``); ``all`` stands for every kind there is."""
    rank: int | None = None
    energy: float = 0.9
    subspace_tokens: int = 16384
    skip_first: int = 0
    keep_sketch: bool = False
    min_expert_tokens: int = 32
    low_memory: bool = False
    activation_budget: str = "auto"
    save_every: str = "5m"
    dry_run: bool = False
    trust_remote_code: bool = False
    lora_merge_cache: str | None = None
    force: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:  # NaN is neither
            raise InputError(f"--energy {self.energy:g}: must lie in (0, 1]")

    def data(self) -> DataSettings:
        """Return what is asked of the data.

        Raises:
            InputError: these options contradict each other.
        """
        return DataSettings(
            datasets=(self.dataset,) if isinstance(self.dataset, str) else self.dataset,
            subset=self.subset,
            split=self.split,
            text_column=self.text_column,
            part=parse_part(self.part),
            samples=self.samples,
            sequence_length=self.sequence_length,
            seed=self.seed,
            max_tokens_per_row=self.max_tokens_per_row,
            recipe=self.recipe,
        )


def parse_part(text: str | None) -> tuple[int, int]:
    """Return which part of how many ``2/4`` means, counted from 0; None is the whole.

    Raises:
        InputError: it is no part.
    """
    if text is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"{text!r} is no part: write 1/4, 2/4, 3/4 or 4/4")
    return int(found[1]) - 1, int(found[2])
