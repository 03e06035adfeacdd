"""How much memory a computation takes, and how much a process holds."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import psutil
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors made inside and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {id(one.untyped_storage()) for one in args if isinstance(one, Tensor)}
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if not isinstance(one, Tensor):
                continue
            storage = one.untyped_storage()
            key = id(storage)
            if key not in self.live and key not in known:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def memory_held() -> int:
    """Return the bytes that are this process's alone and in use.

    What C's allocator has free and keeps is given back first: it varies by several of the tiny
    models' sizes from one moment to the next, with the order in which threads asked for memory.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)
    held: int = psutil.Process().memory_full_info().uss
    return held
