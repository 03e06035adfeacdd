"""What a calibration will take, estimated from one block of it."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil
import torch

from mergekit_arm.errors import InputError
from mergekit_arm.units import duration_text, size_text

_CGROUP = Path("/sys/fs/cgroup")
_POLL = 0.002  # seconds


@dataclass(frozen=True)
class Preflight:
    """Time, memory and size, before the long run. Bytes and seconds."""

    tokens: int
    """To measure, by this process."""
    seconds: float
    """For all of them."""
    weights: int
    """Held at once."""
    sums: int
    activations: int
    """Of a whole batch."""
    batch_size: int
    free: int
    """Memory that is left for the activations; weights and sums are there already."""
    device: str
    output: int
    """Of the statistics directory, at most."""
    parameters: int
    """Of the model."""
    disk: int = 0
    """For hidden states and saved progress, at most."""
    disk_free: int = 0
    low_memory: bool = False

    def lines(self) -> list[str]:
        """Return the estimate in words."""
        held = "one layer's weights" if self.low_memory else "weights"
        return [
            f"{self.tokens:,} tokens will take about {duration_text(self.seconds)}.",
            (
                f"Memory: {size_text(self.weights)} {held}, {size_text(self.sums)} sums, about "
                f"{size_text(self.activations)} activations for {self.batch_size} sequences at "
                f"once ({size_text(self.free)} free on {self.device})."
            ),
            (
                f"Disk: {size_text(self.output)} statistics at most "
                f"({self.output / (2 * self.parameters):.0%} of a bfloat16 checkpoint), "
                f"{size_text(self.disk)} for progress ({size_text(self.disk_free)} free)."
            ),
        ]

    def warnings(self) -> list[str]:
        """Return what will not fit, each with the options that help."""
        found = []
        if self.activations > self.free:
            fitting = self.free * self.batch_size // max(self.activations, 1)
            low = "" if self.low_memory else ", --low-memory"
            smaller = f"--batch-size {fitting}" if fitting else "a shorter --sequence-length"
            found.append(
                f"{self.batch_size} sequences at once may not fit into the "
                f"{size_text(self.free)} that are free on {self.device}: "
                f"use {smaller}{low} or --dtype bfloat16"
            )
        if self.disk + self.output > self.disk_free:
            found.append(
                f"progress and statistics may not fit on the disk, which has "
                f"{size_text(self.disk_free)} free: choose an OUT on a larger one, or fewer "
                "--samples"
            )
        return found


class Cost:
    """What a ``with`` block took: seconds, and bytes beyond what was taken at its start."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.extra = 0

    def __enter__(self) -> Cost:
        self._began = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._over = threading.Event()
            self._process = psutil.Process()
            self._before = self._process.memory_info().rss
            self._thread = threading.Thread(target=self._poll, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._began
        if self.device.type == "cuda":
            self.extra = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._over.set()
            self._thread.join()

    def _poll(self) -> None:
        while not self._over.wait(_POLL):
            self.extra = max(self.extra, self._process.memory_info().rss - self._before)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take on ``device``.

    On the CPU, the smaller of what the machine has left and what its container may take.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available: int = psutil.virtual_memory().available
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            statistics = (_CGROUP / "memory.stat").read_text()
            # Cached files count as used, and go as soon as memory is wanted.
            cached = int(statistics.split("inactive_file ")[1].split()[0])
            available = min(available, int(limit) - used + cached)
    except (OSError, IndexError, ValueError):
        pass  # no container, or none that says
    return available


def free_disk(path: Path) -> int:
    """Return the bytes that are free where ``path`` is, or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def check_weights_fit(
    size: int, device: torch.device, dtype: torch.dtype, model: str, processes: int
) -> None:
    """Refuse to load weights of ``size`` bytes, once for each of ``processes``, into what is free.

    Raises:
        InputError: with the options that help.
    """
    free = free_memory(device)
    if size * processes > free:
        times = f", in each of {processes} processes" if processes > 1 else ""
        name = str(dtype).removeprefix("torch.")
        narrower = "" if dtype.itemsize < 4 else ", --dtype bfloat16"
        raise InputError(
            f"{model} takes {size_text(size)} in {name}{times}, and {size_text(free)} are free on "
            f"{device}: use --low-memory, --device-map auto{narrower}"
        )
