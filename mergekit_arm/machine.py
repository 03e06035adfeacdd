"""Free memory and disk, what a piece of work cost, and what running out of memory looks like."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux says what this process's container may take."""
_POLL = 0.002  # seconds


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


@contextmanager
def one_thread_each(workers: int) -> Iterator[Executor]:
    """Give a pool of ``workers`` threads on each of which torch computes with that thread alone.

    So many small pieces of work at once are faster than one after the other on all cores, and
    the numbers do not depend on how many cores there are. The calling thread, too, computes alone
    until the block ends.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread, and of those that begin from here on
    try:
        with ThreadPoolExecutor(workers) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process may still take on ``device``.

    On the CPU, the smaller of what the machine has left and what its container may take.
    """
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    available: int = psutil.virtual_memory().available
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((CGROUP / "memory.current").read_text())
            statistics = (CGROUP / "memory.stat").read_text()
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


def out_of_memory(error: BaseException) -> bool:
    """Say whether ``error`` is what torch or Python raises when memory has run out.

    Unlike accelerate's ``should_reduce_batch_size``: that one knows no ``MemoryError``, and takes
    a shape that cuDNN does not support for a lack of memory.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # CPU and MPS allocators raise a RuntimeError and nothing more particular.
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "out of memory" in text
    )
