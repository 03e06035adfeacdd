"""When two statistics directories hold the same measurement."""

from __future__ import annotations

from pathlib import Path

import torch
from mergekit.io.lazy_tensor_loader import LazyTensorLoader

from mergekit_arm.statistics.format import METADATA_FILE, Metadata


def load_statistics(folder: Path) -> tuple[Metadata, dict[str, torch.Tensor]]:
    """Return the metadata and all tensors of a directory, sharded or not."""
    loader = LazyTensorLoader.from_disk(str(folder))
    tensors = {name: loader.get_tensor(name) for name in loader.index.tensor_paths}
    return Metadata.model_validate_json((folder / METADATA_FILE).read_text()), tensors


def assert_same_statistics(found: Path, expected: Path, rtol: float = 1e-5) -> None:
    """Compare records exactly, sums to ``rtol``, and subspaces as subspaces.

    A basis is stored in bfloat16, so that the last bit of a sum can move an entry by 1/256 of
    itself: the spans are compared, by the projectors onto them.
    """
    (one, tensors), (other, wanted) = load_statistics(found), load_statistics(expected)
    assert set(tensors) == set(wanted)
    assert one.weights == other.weights
    assert list(one.sites) == list(other.sites)
    for name, site in other.sites.items():
        assert one.sites[name].tokens == site.tokens, name
        assert one.sites[name].subspace == site.subspace, name
    for name, value in wanted.items():
        if name.endswith(".basis"):
            difference = _projector(tensors[name]) - _projector(value)
            assert float(difference.norm()) < 0.02 * value.shape[1] ** 0.5, name
        elif name.endswith((".sketch", ".eigenvalues")):
            # Neither is a sum of positive numbers: their error is a share of the largest.
            scale = float(value.abs().max())
            torch.testing.assert_close(tensors[name], value, rtol=rtol, atol=rtol * scale, msg=name)
        else:
            torch.testing.assert_close(tensors[name], value, rtol=rtol, atol=0, msg=name)


def _projector(basis: torch.Tensor) -> torch.Tensor:
    wide = basis.double()
    return wide @ torch.linalg.pinv(wide)
