"""Probes: a handful of a weight's own values at fixed positions.

A probe recognises a weight whatever it is called. At merge time it is compared with the
tensor at hand, so that statistics of another model, revision or layer are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

PROBE_SIZE = 32

_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio: its multiples spread evenly modulo 2⁶⁴
_NARROW_DTYPES = (torch.bfloat16, torch.float16)


@lru_cache(maxsize=4096)
def probe_positions(numel: int) -> Tensor:
    """Return ``PROBE_SIZE`` flat positions (int64) in a tensor of ``numel`` elements.

    Multiples of the golden ratio, so that they fall into different rows *and* columns;
    an even stride would often stay in one column.
    """
    return torch.tensor(
        [((i * _GOLDEN % 2**64) * numel) >> 64 for i in range(1, PROBE_SIZE + 1)],
        dtype=torch.int64,
        # With --multi-gpu, mergekit makes a GPU the default device.
        device="cpu",
    )


def take_probe(tensor: Tensor) -> Tensor:
    """Return the probe of a non-empty ``tensor``: ``(PROBE_SIZE,)`` float32 on the CPU.

    Exact for float32 and narrower weights. Reads only the probed elements, so that a
    memory-mapped tensor is not paged in.
    """
    positions = probe_positions(tensor.numel())
    if tensor.is_contiguous():
        values = tensor.reshape(-1)[positions.to(tensor.device)]
    else:
        index = torch.unravel_index(positions.to(tensor.device), tensor.shape)
        values = tensor[index]
    return values.detach().to(device="cpu", dtype=torch.float32)


def content_hash(tensors: Iterable[tuple[str, Sequence[int], str, Tensor]]) -> str:
    """Return a SHA-256 over names, shapes, dtypes and probes; independent of sharding.

    ``tensors``: one entry for every tensor with a value in it, integers too, sorted by name; dtypes
    as ``float32``.
    """
    digest = hashlib.sha256()
    for name, shape, dtype, probe in tensors:
        digest.update(f"{name} {list(shape)} {dtype} ".encode())
        digest.update(probe.numpy().tobytes())
    return digest.hexdigest()


def probe_variants(probes: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return what ``probes`` may look like in a tensor of ``dtype``, most direct first.

    A merge casts its inputs to its own ``dtype``, possibly by way of a narrower one
    (``dtype: float16`` and then promotion); a cast of the same values is not a difference.
    """
    direct = probes.to(dtype).to(torch.float32)
    variants = [direct]
    for narrow in _NARROW_DTYPES:
        cast = probes.to(narrow).to(dtype).to(torch.float32)
        if not torch.equal(cast, direct):
            variants.append(cast)
    return variants


def probe_matches(probe: Tensor, tensor: Tensor) -> bool:
    """Say whether ``tensor`` holds the probed weight, exactly or after a change of dtype."""
    found = take_probe(tensor)
    return any(torch.equal(found, variant) for variant in probe_variants(probe, tensor.dtype))
