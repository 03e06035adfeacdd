"""Streaming merging: checkpoints merged one after another, each merge a step.

    >>> from mergekit_arm.streaming import stream
    >>> stream("stream.yml", "./out")

``StreamCallback`` feeds a training run's checkpoints to a stream while training goes on.

Read this folder in the order of what happens. ``config`` is the YAML file, with ``calibration``,
``rates`` and ``verdict`` for its larger keys; ``options`` are the flags, ``layout`` how files are
named. ``plan`` turns these into steps and refuses what does not hold together; ``forecast`` looks
at data and disk as well, and is the dry run. ``stream`` is the loop; ``step`` is what it repeats,
``rescoring`` brings in a judge that has changed, ``state`` is what is saved for a resume, and
``ending`` makes the final model.
``training`` finds the checkpoints, also while they are being written. ``report`` is the final
model's card and the picture. ``STREAMING.md`` is the text for users.
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
