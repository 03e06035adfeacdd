"""A model is recognised by a few bytes of it, and its files are not read for that."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_arm.files import sampled_hash
from mergekit_arm.models.contents import describe
from tests.support.models import perturbed, tiny_llama


def test_another_training_is_recognised_and_a_copy_is_not_another(tmp_path: Path) -> None:
    model = tiny_llama(0)
    model.save_pretrained(tmp_path / "a")
    perturbed(model, 1, 1e-4).save_pretrained(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "model.safetensors", (0, 0))
    a, b, copy = (describe(str(tmp_path / name)) for name in ("a", "b", "copy"))
    assert a.fingerprint == copy.fingerprint != b.fingerprint
    assert a.shapes == b.shapes
    assert a.parameters == sum(weight.numel() for weight in model.state_dict().values())


def test_a_change_of_one_tensor_is_recognised(tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    for name in weights:
        changed = {**weights, name: weights[name] * 1.001}
        save_file(changed, tmp_path / "b" / "model.safetensors", {"format": "pt"})
        assert describe(str(tmp_path / "a")) != describe(str(tmp_path / "b")), name


def test_pickled_weights_are_recognised_by_their_checksums(tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path / "a")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    found = []
    for factor in (1.0, 1.0, 1.001):
        folder = tmp_path / f"{len(found)}"
        folder.mkdir()
        shutil.copy(tmp_path / "a" / "config.json", folder)
        changed = {name: weight * factor for name, weight in weights.items()}
        torch.save(changed, folder / "pytorch_model.bin")
        found.append(describe(str(folder)))
    assert found[0] == found[1] != found[2]
    assert found[0].shapes == {name: tuple(one.shape) for name, one in weights.items()}


def resident(file: Path) -> int:
    """Return how many bytes of a file the kernel holds in memory."""
    size = file.stat().st_size
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, mmap.MAP_PRIVATE) as mapped:
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages) == 0
        return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what it holds in memory")
def test_describing_reads_a_small_part_of_the_files(tmp_path: Path) -> None:
    tiny_llama(0).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {f"layers.{n}.weight": torch.rand(1024, 1024) for n in range(24)}
    save_file(tensors, file, {"format": "pt"})
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    before = resident(file)
    if before > file.stat().st_size // 2:
        pytest.skip("this file system forgets nothing")
    describe(str(tmp_path))
    assert resident(file) - before < 10_000_000  # of 100 MB; the rest is what is read ahead


def test_a_large_file_is_recognised_by_pieces(tmp_path: Path) -> None:
    file = tmp_path / "data"
    content = bytearray(os.urandom(1 << 20))
    file.write_bytes(content)
    first = sampled_hash(file)
    assert sampled_hash(file) == first
    for position in (0, len(content) - 1):
        content[position] ^= 1
        file.write_bytes(content)
        assert sampled_hash(file) != first
        content[position] ^= 1
    file.write_bytes(content[:-1])
    assert sampled_hash(file) != first
    file.write_bytes(b"small")
    assert sampled_hash(file) != first
