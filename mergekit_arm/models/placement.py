"""Where weights go that no single device holds: over several, or to the disk, by accelerate."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mergekit_arm.machine import free_memory

Placement = dict[str, Any]
"""Arguments of transformers' ``from_pretrained``."""

_ROOM = 0.6  # of an accelerator's free memory for weights; activations and sums need the rest


def spread(device_map: str, stack: ExitStack, out: Path) -> Placement:
    """Place weights by an accelerate strategy; what fits nowhere else goes beside ``out``."""
    return {"device_map": device_map, "offload_folder": _folder(stack, out)}


def offload(device: torch.device, stack: ExitStack, out: Path) -> Placement:
    """Keep weights on the disk, but for what an accelerator holds; never in main memory."""
    placement: Placement = {"device_map": {"": "disk"}, "offload_folder": _folder(stack, out)}
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        placement["device_map"] = "auto"
        placement["max_memory"] = {number: int(free_memory(device) * _ROOM), "cpu": 0}
    return placement


def _folder(stack: ExitStack, out: Path) -> str:
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    return stack.enter_context(
        TemporaryDirectory(prefix=f".{out.name}.offload-", dir=out.absolute().parent)
    )
