"""Write a statistics directory: complete or absent, never in between."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from mergekit_arm.errors import InputError
from mergekit_arm.files import publish, remove
from mergekit_arm.statistics.digest import document_digest, tensor_digest
from mergekit_arm.statistics.format import METADATA_FILE, Metadata
from mergekit_arm.statistics.locate import TENSOR_FILE

PROBES = "probes"
ROWS = "rows"
"""Hashes of the rows of data that were measured: two directories without a common one add up."""


def check_destination(out: Path, force: bool) -> None:
    """Refuse a destination that ``write_statistics`` would refuse; call it before long work.

    Even ``force`` replaces only an empty directory or one that holds statistics and nothing else:
    a mistyped path must not cost anybody a model.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; name a directory for the statistics")
    if not any(out.iterdir()):
        return
    # A merged model has the file too: it says with which statistics it was merged.
    if not (out / METADATA_FILE).is_file() or (out / "config.json").exists():
        raise InputError(
            f"{out} exists and holds no statistics; it will not be replaced: choose another name"
        )
    if not force:
        raise InputError(f"{out} exists; add --force to replace it, or choose another name")
    foreign = sorted(one.name for one in out.iterdir() if not _is_ours(one))
    if foreign:
        raise InputError(
            f"{out} holds {foreign[0]} beside its statistics, and --force would remove that: move "
            "it, or choose another name"
        )


def _is_ours(path: Path) -> bool:
    """Say whether a file is a part of statistics, or hidden as what the Hub's client leaves is."""
    named = path.name in (METADATA_FILE, "README.md", f"{TENSOR_FILE}.index.json")
    parts = path.name.startswith(Path(TENSOR_FILE).stem) and path.suffix == ".safetensors"
    return path.name.startswith(".") or (not path.is_dir() and (named or parts))


def write_statistics(
    out: Path, metadata: Metadata, tensors: Mapping[str, Tensor], card: str, *, force: bool = False
) -> None:
    """Write format 1 to ``out``: safetensors under the names that mergekit's loader opens.

    ``tensors`` holds ``probes`` and every ``<site>.<key>``; their digests go into the metadata.
    Everything goes into a temporary directory beside ``out``, is flushed, and is renamed into
    place at the end.

    Raises:
        InputError: ``out`` exists and may not be replaced.
    """
    out = out.absolute()
    check_destination(out, force)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        stored = {name: one.detach().cpu().contiguous() for name, one in sorted(tensors.items())}
        save_torch_state_dict(stored, staging, max_shard_size="5GB")
        digests = {name: tensor_digest(tensor) for name, tensor in stored.items()}
        (staging / METADATA_FILE).write_text(_sealed(metadata, digests), encoding="utf-8")
        (staging / "README.md").write_text(card, encoding="utf-8")
        if out.exists():
            # Set aside in one step, so that no half-removed one is ever seen under its own name.
            remove(out)
        publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sealed(metadata: Metadata, digests: Mapping[str, str]) -> str:
    """Return the metadata as JSON, with the tensors' digests and its own."""
    complete = metadata.model_copy(update={"digests": dict(digests), "digest": None})
    own = document_digest(json.loads(complete.model_dump_json(exclude_none=True)))
    sealed = complete.model_copy(update={"digest": own})
    return sealed.model_dump_json(indent=1, exclude_none=True) + "\n"
