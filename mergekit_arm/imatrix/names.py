"""llama.cpp's names of a model's weights, from the table of its own package ``gguf``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mergekit_arm.errors import InputError, did_you_mean
from mergekit_arm.imatrix.files import load_gguf

_OTHERWISE = {
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "cohere": "command-r",
    "gemma3_text": "gemma3",
}
"""transformers' model type → llama.cpp's architecture, where the names are not alike."""

_EXPERT = re.compile(r"(?<=\.experts)\.(\d+)(?=\.)")
_FUSED = re.compile(r"(?<=\.experts\.)gate_up_proj$")


@dataclass(frozen=True)
class LlamaName:
    """What llama.cpp calls a weight."""

    name: str
    expert: int | None = None
    """Which row of the stack, where llama.cpp stacks what the checkpoint has apart."""


class LlamaNames:
    """The names of one architecture."""

    def __init__(self, model_type: str, layers: int) -> None:
        """Read the table for transformers' ``model_type``.

        Raises:
            InputError: llama.cpp has no such architecture, or ``gguf`` is not installed.
        """
        gguf = load_gguf()
        known = {_plain(name): arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        wanted = _plain(_OTHERWISE.get(model_type, model_type))
        if wanted not in known:
            raise InputError(
                f"llama.cpp's package gguf has no architecture {model_type}"
                f"{did_you_mean(wanted, known)}"
            )
        self._map: Any = gguf.get_tensor_name_map(known[wanted], layers)

    def of(self, weight: str) -> LlamaName | None:
        """Return llama.cpp's name of a weight of the checkpoint; None where it has none."""
        found = _EXPERT.search(weight)
        stacked = _EXPERT.sub("", weight)
        name = self._map.get_name(stacked, try_suffixes=(".weight", ".bias"))
        if name is None and _FUSED.search(weight):
            # transformers' stack of both, which read one input; llama.cpp has two stacks.
            name = self._map.get_name(_FUSED.sub("gate_proj", weight))
        if name is None:
            return None
        if not name.endswith((".weight", ".bias")):
            name += ".weight"
        return LlamaName(name, int(found[1]) if found else None)


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "")
