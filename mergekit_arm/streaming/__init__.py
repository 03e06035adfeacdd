"""Streaming merging: checkpoints merged one after another, each merge a step.

    >>> from mergekit_arm.streaming import stream
    >>> stream("stream.yml", "./out")

``StreamCallback`` feeds a training run's checkpoints to a stream while training goes on.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "StreamCallback",
    "StreamConfig",
    "StreamOptions",
    "StreamResult",
    "WatchOptions",
    "stream",
]

_HOMES = {
    "StreamCallback": "callback",
    "StreamConfig": "config",
    "StreamOptions": "run",
    "StreamResult": "run",
    "WatchOptions": "watch",
    "stream": "run",
}


def __getattr__(name: str) -> Any:
    # The reports read this package's records, and importing all of it for them would be slow.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
