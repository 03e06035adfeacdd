"""Statistics changed on purpose: controls that know less of the activations, and smaller ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SEED = 7

Change = Callable[[Path, Path], None]
"""``change(source, out)`` writes a changed copy of a directory."""


def random_subspace(source: Path, out: Path) -> None:
    """Copy statistics with every basis replaced by a random one of as many columns."""

    def replace(tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        for name in sorted(one for one in tensors if one.endswith(".basis")):
            basis = tensors[name]
            drawn = torch.randn(basis.shape, generator=generator, dtype=torch.float64)
            tensors[name] = torch.linalg.qr(drawn).Q.to(basis.dtype).contiguous()

    _changed(source, out, replace)


def permuted_importance(source: Path, out: Path) -> None:
    """Copy statistics with the channels' importances of every site in a random order."""

    def replace(tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        sites = sorted(
            name.removesuffix(".abs_sum") for name in tensors if name.endswith(".abs_sum")
        )
        for site in sites:
            order = torch.randperm(tensors[f"{site}.abs_sum"].shape[-1], generator=generator)
            for key in ("abs_sum", "square_sum"):
                tensors[f"{site}.{key}"] = tensors[f"{site}.{key}"][..., order].contiguous()

    _changed(source, out, replace)


def even_importance(source: Path, out: Path) -> None:
    """Copy statistics in which all channels but each site's loudest share what they had together.

    AIM then shrinks by the same mean as before, and by the same everywhere.
    """

    def replace(tensors: dict[str, Tensor], generator: torch.Generator) -> None:
        for name in sorted(one for one in tensors if one.endswith(".abs_sum")):
            sums = tensors[name].double()
            loudest, where = sums.max(-1, keepdim=True)
            rest = (sums.sum(-1, keepdim=True) - loudest) / (sums.shape[-1] - 1)
            even = rest.expand_as(sums).clone().scatter_(-1, where, loudest)
            tensors[name] = even.to(tensors[name].dtype)

    _changed(source, out, replace)


def fewer_columns(columns: int) -> Change:
    """Return what keeps only so many columns of every basis, the leading ones."""

    def replace(tensors: dict[str, Tensor], _: torch.Generator) -> None:
        for name in [one for one in tensors if one.endswith((".basis", ".eigenvalues"))]:
            tensors[name] = tensors[name][..., :columns].contiguous()

    return lambda source, out: _changed(source, out, replace)


def less_correlated(share: float) -> Change:
    """Return what scales the stored eigenvalues: methods that believe α of them believe less."""

    def replace(tensors: dict[str, Tensor], _: torch.Generator) -> None:
        for name in [one for one in tensors if one.endswith(".eigenvalues")]:
            tensors[name] = tensors[name] * share

    return lambda source, out: _changed(source, out, replace)


CHANGES: dict[str, Change] = {
    "16": fewer_columns(16),
    "64": fewer_columns(64),
    "half": less_correlated(0.5),
    "diagonal": less_correlated(0.0),
}
"""What a name after ``~`` makes of a directory: ``general~16`` has 16 columns a basis."""


def data_free_moments(
    source: Path, out: Path, specialist: dict[str, Tensor], base: dict[str, Tensor]
) -> None:
    """Copy statistics with every second moment taken from the task vectors that read there.

    Gradients are sums of outer products with a layer's inputs, so that ``τᵀ τ`` tells something of
    these inputs without any data. The mean of a site's moments stays as it was measured.
    """
    metadata = json.loads((source / "activation_stats.json").read_text(encoding="utf-8"))
    readers: dict[str, list[str]] = {}
    for name, record in metadata["weights"].items():
        if record.get("site"):
            readers.setdefault(record["site"], []).append(name)

    def replace(tensors: dict[str, Tensor], _: torch.Generator) -> None:
        for site in sorted(one.removesuffix(".basis") for one in tensors if ".basis" in one):
            moved = torch.cat([specialist[name] - base[name] for name in readers[site]])
            values, vectors = torch.linalg.eigh(moved.T.double() @ moved.double())
            trace = tensors[f"{site}.trace"].double()
            values = values.flip(0).clamp(min=0) * (trace / values.sum())
            columns = tensors[f"{site}.basis"].shape[1]
            squares = (vectors.flip(1).square() * values).sum(1)
            known = tensors[f"{site}.square_sum"]
            kept = {
                "basis": vectors.flip(1)[:, :columns],
                "eigenvalues": values[:columns],
                "square_sum": squares * (known.sum() / squares.sum()),
            }
            for key, value in kept.items():
                tensors[f"{site}.{key}"] = value.to(tensors[f"{site}.{key}"].dtype).contiguous()

    _changed(source, out, replace)


def _changed(
    source: Path, out: Path, replace: Callable[[dict[str, Tensor], torch.Generator], None]
) -> None:
    beside = out.with_name(out.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    tensors = load_file(source / "model.safetensors")
    replace(tensors, torch.Generator().manual_seed(SEED))
    save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
    metadata = json.loads((beside / "activation_stats.json").read_text(encoding="utf-8"))
    for site, record in metadata["sites"].items():
        if (kept := tensors.get(f"{site}.eigenvalues")) is not None and record.get("subspace"):
            record["subspace"] = len(kept)
            record["energy"] = float(kept.double().sum() / tensors[f"{site}.trace"])
    # The directory says of itself that it is whole; what is changed on purpose says nothing.
    metadata.pop("digest", None)
    metadata.pop("digests", None)
    (beside / "activation_stats.json").write_text(json.dumps(metadata), encoding="utf-8")
    os.replace(beside, out)
