"""The second moments of a weight's inputs as a statistics directory holds them.

``moments.py`` has the mathematics. Where eigenvectors are not stored by definition, there is the
diagonal alone for experts, each its own, and nothing for the output head: its inputs are spread
unlike any other's, and it is often the embedding too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch

from mergekit_arm.errors import InputError
from mergekit_arm.methods.base import Found
from mergekit_arm.methods.moments import SecondMoment, second_moment
from mergekit_arm.statistics.format import EXPERTS
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.kinds.subspace import SUBSPACE

T = TypeVar("T")


@dataclass(frozen=True)
class StoredMoment:
    """The second moment C̃ of one weight's inputs, known to be there and not yet read.

    Two of the same input are equal, in whichever weight's name they were found.
    """

    key: Hashable
    """The open statistics, the site, and which expert it is of."""
    found: Found
    diagonal: bool
    """Of C, only the diagonal is read."""

    def read(self, alpha: float) -> SecondMoment:
        """Return C̃ = α C + (1 − α) diag C, on the CPU.

        Raises:
            InputError: what is stored is damaged.
        """
        statistics, record = self.found.statistics, self.found.record
        square = IMPORTANCE.values(statistics, record, "rms").double().square()
        pairs = None if self.diagonal else SUBSPACE.eigenpairs(statistics, record)
        try:
            return second_moment(square, *(pairs or (None, None)), alpha=alpha)
        except ValueError as error:
            raise InputError(
                f"activation_stats {statistics.reference}: {record.site}: {error}; "
                "copy or measure it again"
            ) from error


def stored_moment(found: Found, *, diagonal: bool, hint: str = "") -> StoredMoment | None:
    """Return the second moment of a measured weight's inputs; None for the output head.

    With ``diagonal``, the head's inputs have one too.

    Args:
        found: where the weight's statistics stand; its record has a site.
        diagonal: only the diagonal is wanted.
        hint: what else the user can do where there are no eigenvectors, to end the message.

    Raises:
        InputError: it was not measured.
    """
    statistics, site = found.statistics, found.record.site
    wanted = (IMPORTANCE,) if diagonal else (IMPORTANCE, SUBSPACE)
    missing = [kind.name for kind in wanted if not kind.measured(statistics)]
    if missing or site is None:
        held = ", ".join(statistics.metadata.settings.statistics)
        raise InputError(
            f"{found.name}: activation_stats {statistics.reference} hold {held} and no "
            f"{' and no '.join(missing)}, so no second moments: calibrate again with "
            f"--statistics all{hint if missing == [SUBSPACE.name] else ''}"
        )
    left_out = statistics.metadata.sites[site].no_subspace
    if not diagonal and left_out not in (None, EXPERTS):
        return None
    key = (statistics, site, found.record.row)
    return StoredMoment(key, found, diagonal or left_out is not None)


def once(moments: list[StoredMoment], settings: Hashable, make: Callable[[], T]) -> T:
    """Return what ``make`` makes of ``moments`` with ``settings``, lately made or anew.

    Weights that read the same input share it. It is kept beside the first one's statistics, a
    few at a time, and goes with them.
    """
    key = (settings, tuple((one.key, one.diagonal) for one in moments))
    return moments[0].found.statistics.once(key, make)


def no_moment(like: SecondMoment) -> SecondMoment:
    """Return the second moment of inputs that never were, of ``like``'s shape."""
    nothing = torch.zeros_like(like.diagonal)
    return SecondMoment(nothing, nothing)
