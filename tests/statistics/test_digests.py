"""A directory says what is in it: a flipped bit or a hand edit is refused, and named."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.combine import combine
from mergekit_arm.statistics.read import Statistics
from tests.support.edits import edit
from tests.support.paths import PACKAGE

SITE = "model.layers.1.self_attn.q_proj"
FORMAT = (PACKAGE / "statistics" / "FORMAT.md").read_text(encoding="utf-8")
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "I64": "int64"}


@pytest.fixture
def stats(family: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(family / "stats", tmp_path / "s"))


def assert_sealed(folder: Path) -> None:
    """Compare every digest with the SHA-256 of the file's own bytes, found by its header."""
    metadata = json.loads((folder / "activation_stats.json").read_text(encoding="utf-8"))
    content = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    assert set(metadata["digests"]) == set(header)
    for name, part in header.items():
        start, end = (8 + length + offset for offset in part["data_offsets"])
        text = f"{DTYPES[part['dtype']]} {part['shape']} "
        wanted = hashlib.sha256(text.encode() + content[start:end]).hexdigest()
        assert metadata["digests"][name] == wanted, name
    own = metadata.pop("digest")
    plain = json.dumps(metadata, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(plain.encode()).hexdigest() == own


def test_what_calibrate_and_combine_write(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    assert_sealed(family / "stats")
    assert "`float64 [32] `" in FORMAT
    parts = [tmp_path / "1", tmp_path / "2"]
    for number, part in enumerate(parts, 1):
        measure(family / "base", part, statistics=("importance",), part=f"{number}/2")
    combine([str(part) for part in parts], tmp_path / "sum")
    assert_sealed(tmp_path / "sum")


@pytest.mark.parametrize("key", ["abs_sum", "square_sum", "basis", "eigenvalues", "trace"])
@pytest.mark.parametrize("bit", [0, 5])
def test_a_flipped_bit(key: str, bit: int, stats: Path) -> None:
    flip(stats, f"{SITE}.{key}", bit)
    opened = Statistics("my-stats", stats)
    with pytest.raises(InputError) as error:
        opened.tensor(SITE, key)
    assert f"values of {SITE}.{key} are not those that were written" in error.value.message
    opened.tensor("model.layers.0.self_attn.q_proj", key)


@pytest.mark.parametrize("name", ["probes", "rows"])
def test_a_flipped_bit_in_what_belongs_to_no_site(name: str, stats: Path) -> None:
    flip(stats, name, 0)
    with pytest.raises(InputError, match=f"values of {name} are not those that were written"):
        Statistics("my-stats", stats).stored(name)


def flip(stats: Path, name: str, bit: int) -> None:
    """Flip one bit of the first byte of a tensor: of a float, one of the least significant."""
    file = stats / "model.safetensors"
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    offset = json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
    content[8 + length + offset] ^= 1 << bit
    file.write_bytes(content)


def rewrite(stats: Path, change: Callable[[dict[str, Any]], object], **layout: Any) -> None:
    file = stats / "activation_stats.json"
    metadata = json.loads(file.read_text(encoding="utf-8"))
    change(metadata)
    file.write_text(json.dumps(metadata, **layout), encoding="utf-8")


def turn_every_square_weight(metadata: dict[str, Any]) -> None:
    """What neither shapes nor probes can tell: all weights of a role have the same wrong axis."""
    for name, weight in metadata["weights"].items():
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            assert weight["shape"][0] == weight["shape"][1]
            weight["input_axis"] = 0


def test_an_input_axis_that_shapes_and_probes_allow(stats: Path) -> None:
    rewrite(stats, turn_every_square_weight)
    with pytest.raises(InputError, match=r"activation_stats\.json is not as it was written"):
        Statistics("my-stats", stats)


def test_a_tensor_without_a_digest(stats: Path) -> None:
    def change(metadata: dict[str, Any]) -> None:
        del metadata["digest"], metadata["digests"]["probes"]

    rewrite(stats, change)
    with pytest.raises(InputError, match="no digest of probes"):
        Statistics("my-stats", stats)


def test_another_layout_of_the_file_is_no_change(stats: Path) -> None:
    before = Statistics("my-stats", stats).metadata
    rewrite(stats, lambda _: None, indent=7, sort_keys=True)
    assert Statistics("my-stats", stats).metadata == before


def test_an_edit_on_purpose(stats: Path) -> None:
    def publish(metadata: dict[str, Any]) -> None:
        metadata["model"]["reference"] = "org/name"
        del metadata["digest"]

    rewrite(stats, publish)
    assert Statistics("my-stats", stats).metadata.model.reference == "org/name"


def test_older_directories_are_read_as_before(stats: Path) -> None:
    opened = Statistics("my-stats", edit(stats))
    assert opened.metadata.digests is None
    for name, tensor in load_file(stats / "model.safetensors").items():
        assert opened.stored(name).equal(tensor)
