"""Make our methods known to mergekit, by names that are never another's.

``MERGEKIT_ARM_PREFIX`` in the environment is put before all of them, for the case that mergekit or
another plugin has a method of the same name. ``aim_<method>`` exists for every method there is,
also for one that is registered later: its twin is made when that is first asked for, since
mergekit promises that ``register`` adds one method and no more.
"""

from __future__ import annotations

import logging
import os

from mergekit import merge_methods
from mergekit.merge_methods import MergeMethod

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.methods.aim import ActivationInformedMerge
from mergekit_arm.methods.base import StatisticsMethod

LOG = logging.getLogger(__name__)

PREFIX = "MERGEKIT_ARM_PREFIX"
OVER = "task_arithmetic"
"""What ``aim`` alone wraps."""


def register(kind: type[StatisticsMethod]) -> None:
    """Register a method under its name, unless it is there; calling it again changes nothing.

    A method of that name that is not ours stays, and a warning says how to reach ours.
    """
    name = prefixed(kind.name)
    if not _taken(name, kind):
        merge_methods.register(kind(name))


def register_aim() -> None:
    """Register ``aim`` and ``aim_<name>`` for every method mergekit has, now or later."""
    registry = merge_methods.registry
    plain_get = registry.get
    if getattr(plain_get, "makes_twins", False):
        return
    for method in merge_methods.registered_methods():
        _register_twin(method, prefixed(f"{ActivationInformedMerge.name}_{method.spec.name}"))
        if method.spec.name == OVER:
            _register_twin(method, prefixed(ActivationInformedMerge.name))

    found: set[str] = set()  # mergekit asks for the method of every tensor

    def get(name: str) -> MergeMethod:
        start = prefixed(f"{ActivationInformedMerge.name}_")
        if not name.startswith(start) or name in found:
            return plain_get(name)
        known = {method.spec.name: method for method in merge_methods.registered_methods()}
        if name not in known:
            inner = known.get(name.removeprefix(start))
            if inner is None:
                raise InputError(f"no merge method {name!r}{did_you_mean(name, known)}")
            merge_methods.register(ActivationInformedMerge(inner, name))
        found.add(name)
        return plain_get(name)

    get.makes_twins = True  # type: ignore[attr-defined]  # tells that it is ours
    registry.get = merge_methods.get = get


def prefixed(name: str) -> str:
    """Return the name under which our method ``name`` is registered."""
    return os.environ.get(PREFIX, "") + name


def _register_twin(method: MergeMethod, name: str) -> None:
    if _taken(name, ActivationInformedMerge):
        return
    try:
        twin = ActivationInformedMerge(method, name)
    except InputError:
        return  # said to whoever asks for it
    merge_methods.register(twin)


def _taken(name: str, kind: type[StatisticsMethod]) -> bool:
    """Say whether a method has this name, and warn where it is not ``kind``, of ours."""
    for method in merge_methods.registered_methods():
        if method.spec.name == name:
            # By name, because a class that has been imported again is another one.
            there = type(method)
            if (there.__module__, there.__qualname__) != (kind.__module__, kind.__qualname__):
                LOG.warning(
                    "merge method %s is not mergekit-arm's, whose own cannot have that name; "
                    "set %s=ours_ to reach it as ours_%s",
                    name,
                    PREFIX,
                    name,
                )
            return True
    return False
