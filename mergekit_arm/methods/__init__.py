"""The merge methods, and their registration with mergekit.

To read in this order: ``base`` (what every method has: the statistics of the weight at hand, the
checks while mergekit plans), with ``parameters`` (how one is declared) and ``planning`` (what
mergekit knows of a planned tensor); ``arm``, with its kernel in ``step``, ``rotation`` and
``alignment``; ``aim``, which wraps any method, with ``anchor`` (the base of methods that take
none). ``moments`` has the algebra of second moments, ``stored`` what of them a directory holds;
``regmean`` with its kernel ``regression`` and ``arm``'s step ``retaining`` are built on the two,
and on ``rows``. ``registration`` comes last. ``ARM.md``, ``AIM.md`` and ``REGMEAN.md`` have the
equations and what was tried.

A new method is one file, and one line in ``METHODS``.
"""

from __future__ import annotations

from mergekit import merge_methods
from mergekit.merge_methods import MergeMethod

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.methods.arm import ArmMerge
from mergekit_arm.methods.base import StatisticsMethod
from mergekit_arm.methods.registration import register, register_aim
from mergekit_arm.methods.regmean import RegMeanMerge

METHODS: tuple[type[StatisticsMethod], ...] = (ArmMerge, RegMeanMerge)


def register_all() -> None:
    """Register every method with mergekit's registry; calling it again changes nothing."""
    for method in METHODS:
        register(method)
    register_aim()  # last: it wraps what is registered, ours included


def find_method(name: str) -> MergeMethod:
    """Return a merge method, mergekit's or ours.

    Raises:
        InputError: there is none of that name.
    """
    register_all()
    known = [method.spec.name for method in merge_methods.registered_methods()]
    try:
        return merge_methods.get(name)
    except (InputError, KeyError, RuntimeError, ValueError) as error:
        # Such as dare-ties: mergekit's names have underscores.
        meant = did_you_mean(str(name).replace("-", "_"), known)
        raise InputError(
            f"merge_method: no method {name!r}{meant}; there are: {', '.join(known)}"
        ) from error
