"""llama.cpp's own ``llama-imatrix`` and ``llama-quantize``, where they are installed.

Both measure or use the very tokens and weights that ours do, so that whole files are compared.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import torch

from mergekit_arm.imatrix.exporting import export_imatrix
from mergekit_arm.imatrix.files import read_imatrix
from mergekit_arm.imatrix.importing import import_imatrix
from mergekit_arm.statistics.read import Statistics
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.gguf_models import byte_experts, byte_llama, write_model
from tests.support.stored import Folder

WHERE = "LLAMA_CPP_BIN"
"""The environment variable with the directory of llama.cpp's programs."""
LENGTH = 64
TEXT = " ".join(f"{n} times {n + 1} is {n * (n + 1)}; who would have thought?" for n in range(32))
MODELS = {"llama": byte_llama, "experts": byte_experts}


def program(name: str) -> str:
    found = shutil.which(name, path=os.environ.get(WHERE))
    if found is None:
        pytest.skip(f"needs llama.cpp's {name} on PATH, or its directory in {WHERE}")
    return found


@dataclass(frozen=True)
class Measured:
    """One model as both know it, and what both measured of one text."""

    base: Path
    gguf: Path
    matrix: Path
    dat: Path
    stats: Path


@pytest.fixture(scope="module", params=MODELS)
def measured(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    measure: Callable[..., Path],
) -> Measured:
    imatrix = program("llama-imatrix")
    folder = tmp_path_factory.mktemp(request.param)
    model = MODELS[request.param](0)
    model.save_pretrained(folder / "base")
    write_model(model, folder / "model.gguf")
    (folder / "text.txt").write_text(TEXT)
    for name in ("matrix.gguf", "matrix.dat"):
        command = [
            imatrix, "-m", folder / "model.gguf", "-f", folder / "text.txt", "-o", folder / name,
            "-c", str(LENGTH), "-b", str(LENGTH), "--process-output", "--no-ppl", "-t", "1",
            "--output-format", name.split(".")[1],
            # In float32 throughout, as ours: elsewhere it rounds keys and values.
            "-ctk", "f32", "-ctv", "f32", "-fa", "off",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    ids = byte_tokenizer()(TEXT)["input_ids"]
    rows = [ids[at : at + LENGTH] for at in range(0, len(ids) - LENGTH + 1, LENGTH)]
    (folder / "tokens.jsonl").write_text("".join(json.dumps({"input_ids": r}) + "\n" for r in rows))
    measure(
        folder / "base",
        folder / "stats",
        dataset=str(folder / "tokens.jsonl"),
        sequence_length=LENGTH,
        dtype="float32",
        min_expert_tokens=0,
    )
    return Measured(
        *(folder / n for n in ("base", "model.gguf", "matrix.gguf", "matrix.dat", "stats"))
    )


def test_both_measure_the_same(measured: Measured, tmp_path: Path) -> None:
    """Σx² and tokens of every weight, by ``llama-imatrix`` and by ``calibrate``."""
    done = import_imatrix(measured.matrix, str(measured.base), tmp_path / "theirs")
    assert not done.unused
    theirs, ours = Folder.open(tmp_path / "theirs"), Folder.open(measured.stats)
    compared = 0
    for name, record in theirs.metadata["weights"].items():
        mine = ours.record(name)
        if "site" not in record:
            assert len(mine["shape"]) == 1 or mine["reason"] == "embedding", name
            continue
        compared += 1
        assert record.get("row") == mine.get("row")
        row = record.get("row", slice(None))
        found, expected = (
            f.tensors[f"{r['site']}.square_sum"][row].double()
            for f, r in ((theirs, record), (ours, mine))
        )
        torch.testing.assert_close(
            found, expected, rtol=1e-4, atol=1e-5 * expected.max().item(), msg=name
        )
        tokens = [
            f.metadata["sites"][r["site"]]["tokens"] for f, r in ((theirs, record), (ours, mine))
        ]
        assert tokens[0] == tokens[1]
    assert compared >= 15


def quantised(measured: Measured, out: Path, *options: object) -> tuple[dict[str, bytes], str]:
    """Return the weights as ``llama-quantize`` leaves them in four bits, and what it says."""
    command = [program("llama-quantize"), *options, measured.gguf, out, "Q4_0", "1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    weights = {
        one.name: one.data.tobytes()
        for one in gguf.GGUFReader(out).tensors
        if one.tensor_type != gguf.GGMLQuantizationType.F32
    }
    return weights, said


def test_quantisation_uses_every_entry(measured: Measured, tmp_path: Path) -> None:
    """With ours it makes what it makes with its own, and something else without any."""
    matrix = export_imatrix(Statistics("stats", measured.stats), tmp_path / "ours.gguf")
    own, said_own = quantised(measured, tmp_path / "1.gguf", "--imatrix", measured.matrix)
    ours, said = quantised(measured, tmp_path / "2.gguf", "--imatrix", tmp_path / "ours.gguf")
    plain, _ = quantised(measured, tmp_path / "3.gguf")
    assert f"have {len(matrix.entries)} importance matrix entries" in said
    for one in (said_own, said):
        assert re.findall(r"did not find weights for (\S+)", one) == ["token_embd.weight"]
    size = sum(map(len, own.values()))
    assert differing(ours, own) < 1e-3 * size  # a few roundings went the other way
    assert differing(ours, plain) > 0.05 * size
    # The head is kept in eight bits, which are the same whatever its inputs are.
    unmoved = {name for name in own if ours[name] == plain[name]}
    assert unmoved == {"token_embd.weight", "output.weight"}


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> int:
    assert one.keys() == other.keys()
    return sum(a != b for name in one for a, b in zip(one[name], other[name], strict=True))


def test_the_older_format_is_read_as_it_was_written(measured: Measured, tmp_path: Path) -> None:
    """Means agree with those of the newer one; of experts that saw nothing both have none."""
    new, old = read_imatrix(measured.matrix), read_imatrix(measured.dat)
    assert old.entries.keys() == new.entries.keys()
    assert (old.chunks, old.datasets) == (new.chunks, new.datasets)
    import_imatrix(measured.matrix, str(measured.base), tmp_path / "new")
    import_imatrix(measured.dat, str(measured.base), tmp_path / "old")
    one, other = Folder.open(tmp_path / "new"), Folder.open(tmp_path / "old")
    assert one.metadata["sites"].keys() == other.metadata["sites"].keys()
    for site in one.metadata["sites"]:
        found, expected = (
            f.tensors[f"{site}.square_sum"].double()
            / torch.tensor(f.metadata["sites"][site]["tokens"]).double().clamp(min=1)[..., None]
            for f in (other, one)
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0, msg=site)
