"""What can be asked of calibration data. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mergekit_arm.errors import InputError

DEFAULT_DATASET = "mit-han-lab/pile-val-backup"
"""The AIM authors' calibration data, split ``validation``."""

RECIPES = ("packed", "aim")
"""How texts become sequences: as this package does, or exactly as the AIM authors do."""

_WEIGHTED = re.compile(r"(?P<name>.+):(?P<weight>\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class DataSettings:
    """Which data is read, and how it is cut into sequences."""

    datasets: tuple[str, ...] = (DEFAULT_DATASET,)
    """Each a name or a path, with ``:WEIGHT`` behind it where several are mixed."""
    subset: str | None = None
    split: str | None = None
    text_column: str | None = None
    part: tuple[int, int] = (0, 1)
    """Which part of how many, counted from 0."""
    samples: int = 256
    sequence_length: int = 512
    seed: int = 42
    max_tokens_per_row: int | None = None
    """None is one sequence for texts and chats, and no limit for rows of token ids."""
    recipe: str = "packed"

    def __post_init__(self) -> None:
        if self.recipe not in RECIPES:
            raise InputError(f"recipe {self.recipe!r}: there are {' and '.join(RECIPES)}")
        if self.max_tokens_per_row is not None and self.max_tokens_per_row < 1:
            raise InputError("--max-tokens-per-row must be 1 or more")
        if self.recipe == "aim" and self.max_tokens_per_row is not None:
            raise InputError(
                "--recipe aim leaves texts longer than --sequence-length out: it takes no "
                "--max-tokens-per-row"
            )


@dataclass(frozen=True)
class Share:
    """One data set of a mixture."""

    name: str
    weight: float


def parse_share(text: str) -> Share:
    """Return the data set and the weight that ``NAME[:WEIGHT]`` means; 1 without a weight.

    What stands behind the last colon is a weight only if it is a number and no file or directory
    has the whole name.

    Raises:
        InputError: a weight of zero.
    """
    found = _WEIGHTED.fullmatch(text)
    if found is None or Path(text).expanduser().exists():
        return Share(text, 1.0)
    if float(found["weight"]) == 0:
        raise InputError(f"--dataset {text}: a weight must be above 0; leave the data set out")
    return Share(found["name"], float(found["weight"]))


def apportion(shares: list[Share], samples: int) -> list[int]:
    """Divide ``samples`` sequences by weight; the largest remainders get what is left over.

    Raises:
        InputError: a share comes to no sequence at all.
    """
    total = sum(share.weight for share in shares)
    exact = [samples * share.weight / total for share in shares]
    counts = [int(count) for count in exact]
    # Ties go to what was named first.
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: samples - sum(counts)]:
        counts[i] += 1
    for share, count in zip(shares, counts, strict=True):
        if count == 0:
            raise InputError(
                f"--dataset {share.name}:{share.weight:g} comes to less than one of {samples} "
                "sequences: give it more weight, or more --samples"
            )
    return counts
