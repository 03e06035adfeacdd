"""Digests: what a directory says of its own content, so that a change of a single bit shows.

They tell damage and hand edits, not forgery: whoever changes a directory on purpose can write
new ones, or leave them out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DIGEST = "digest"
"""The field of the metadata that holds ``document_digest`` of all the others."""


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's dtype, shape and bytes, as hexadecimal digits.

    Args:
        tensor: contiguous, on the CPU, on a little-endian machine as every one that torch runs on.
    """
    dtype = str(tensor.dtype).removeprefix("torch.")
    digest = hashlib.sha256(f"{dtype} {list(tensor.shape)} ".encode())
    digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def document_digest(document: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON document without its own ``digest``, as hexadecimal digits.

    Indentation and the order of the fields do not matter.
    """
    content = {name: value for name, value in document.items() if name != DIGEST}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
