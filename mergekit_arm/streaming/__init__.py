"""Streaming merging: checkpoints merged one after another, each merge a step.

    >>> from mergekit_arm.streaming import stream
    >>> stream("stream.yml", "./out")

``StreamCallback`` feeds a training run's checkpoints to a stream while training goes on.
"""

from __future__ import annotations

from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.options import StreamOptions, WatchOptions
from mergekit_arm.streaming.stream import StreamResult, stream
from mergekit_arm.streaming.training.callback import StreamCallback

__all__ = [
    "StreamCallback",
    "StreamConfig",
    "StreamOptions",
    "StreamResult",
    "WatchOptions",
    "stream",
]
