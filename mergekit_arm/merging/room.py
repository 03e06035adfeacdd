"""Disk and memory that merges take, and what this machine has."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from mergekit_arm.machine import free_disk, free_memory
from mergekit_arm.units import size_text

_LIBRARIES = 700 << 20  # bytes resident once torch, transformers and mergekit are imported


@dataclass(frozen=True)
class Room:
    """What merges take at their peak and what there is, in bytes."""

    disk: int
    """Of merged models' weights."""
    disk_free: int
    memory: int
    """At the peak, about: a shard until it is written, and one tensor's inputs and copies."""
    memory_free: int

    def __str__(self) -> str:
        return (
            f"the merged model takes {size_text(self.disk)} of disk ({size_text(self.disk_free)} "
            f"free) and about {size_text(self.memory)} of memory "
            f"({size_text(self.memory_free)} free)"
        )

    def fields(self) -> dict[str, int]:
        """Return it as JSON has it."""
        return asdict(self)


def room_in(out: Path, disk: int, memory: int) -> Room:
    """Return what there is for merges into ``out`` beside the bytes that they take."""
    cpu = torch.device("cpu")
    return Room(disk, free_disk(out), _LIBRARIES + memory, free_memory(cpu))
