"""The merge methods and their registration with mergekit."""

from __future__ import annotations


def register_all() -> None:
    """Register every method with mergekit's registry; calling it again changes nothing."""
    from mergekit_arm.methods import aim, arm

    # aim last: it wraps what is registered, ours included.
    for module in (arm, aim):
        module.register()
