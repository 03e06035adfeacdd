"""What a statistics directory says of a weight's inputs, read by hand: no code of the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.support.moments_reference import Stored


@dataclass
class Folder:
    """An open directory."""

    metadata: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    @classmethod
    def open(cls, path: Path) -> Folder:
        metadata = json.loads((path / "activation_stats.json").read_text())
        return cls(metadata, load_file(path / "model.safetensors"))

    def record(self, name: str) -> dict[str, Any]:
        """A weight's record, by any of its names."""
        name = self.metadata.get("aliases", {}).get(name, name)
        found = self.metadata["weights"].get(name) or self.metadata["converted"][name]
        return dict(found)

    def stored(self, name: str, *, diagonal: bool = False) -> Stored | None:
        """Second moment of a matrix's inputs; None where there is none, or for an output head."""
        record = self.record(name)
        site = record.get("site")
        if site is None or len(record["shape"]) < 2:
            return None
        of_site = self.metadata["sites"][site]
        left_out = of_site.get("no_subspace")
        if not diagonal and left_out not in (None, "experts"):
            return None
        tokens = torch.tensor(of_site["tokens"], dtype=torch.float64)
        energy = self.tensors[f"{site}.square_sum"].double()
        energy = energy / tokens.clamp(min=1)[..., None]
        if tokens.ndim:
            fewest = self.metadata["settings"]["min_expert_tokens"]
            energy = energy.masked_fill((tokens < max(fewest, 1))[:, None], 0)
        if record.get("row") is not None:
            energy = energy[record["row"]]
        width = energy.shape[-1]
        if diagonal or left_out is not None:
            return Stored(energy.numpy(), np.zeros((width, 0)), np.zeros(0))
        # The rounding of bfloat16 undone, column by column.
        basis = self.tensors[f"{site}.basis"].double().numpy().copy()
        for column in range(basis.shape[1]):
            for earlier in range(column):
                basis[:, column] -= (basis[:, earlier] @ basis[:, column]) * basis[:, earlier]
            basis[:, column] /= np.linalg.norm(basis[:, column])
        values = self.tensors[f"{site}.eigenvalues"].double().numpy()
        return Stored(energy.numpy(), basis, values)
