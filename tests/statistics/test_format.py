"""FORMAT.md says what the schema, the files and the probes are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
from safetensors.torch import load_file

from mergekit_arm.statistics.format import (
    DataRecord,
    Metadata,
    ModelRecord,
    SettingsRecord,
    SiteRecord,
    WeightRecord,
)
from mergekit_arm.statistics.kinds import kinds
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.probe import PROBE_SIZE, take_probe
from mergekit_arm.statistics.read import Statistics
from tests.support.paths import PACKAGE

FORMAT = (PACKAGE / "statistics" / "FORMAT.md").read_text(encoding="utf-8")
TABLES = [line for line in FORMAT.splitlines() if line.startswith("| `")]
RECORDS: list[tuple[str, type[pydantic.BaseModel]]] = [
    ("", Metadata),
    ("model.", ModelRecord),
    ("data.", DataRecord),
    ("settings.", SettingsRecord),
    ("sites.*.", SiteRecord),
    ("weights.*.", WeightRecord),
]


def names_in_tables() -> set[str]:
    return {name for line in TABLES for name in re.findall(r"`([^`]+)`", line.split(" | ")[0])}


def test_every_field_of_the_schema_is_described_and_no_other() -> None:
    prefixes = tuple(prefix for prefix, _ in RECORDS if prefix)
    fields = {prefix + name for prefix, record in RECORDS for name in record.model_fields}
    described = {name for name in names_in_tables() if name.startswith(prefixes) or name in fields}
    # The heads of tables within tables: what they hold is described, field by field.
    assert fields - {"model", "data", "settings"} <= described
    assert described - {"model.safetensors"} <= fields


def test_every_tensor_is_described_with_its_dtype() -> None:
    rows = {re.findall(r"`([^`]+)`", line)[0]: line for line in TABLES}
    for kind in kinds():
        specs = {**kind.adding_up().stored(4096), **kind.adding_up().state(4096)}
        for key, spec in specs.items():
            row = rows[f"<site>.{key}"]
            assert f"| {kind.name} | {str(spec.dtype).removeprefix('torch.')} |" in row
            assert row.split("|")[4].count(",") == (1 if len(spec.shape) else 0)
        for name in kind.adding_up().shared(4096):
            assert name.replace("4096", "<in>") in rows


def test_what_is_written_is_what_is_described(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    folder = measure(family / "base", tmp_path / "s", keep_sketch=True, rank=8)
    described = names_in_tables()
    assert {path.name for path in folder.iterdir()} <= described
    metadata = json.loads((folder / "activation_stats.json").read_text())
    sites = metadata["sites"]
    for name in load_file(folder / "model.safetensors"):
        site, _, key = name.rpartition(".")
        generic = f"<site>.{key}" if site in sites else re.sub(r"\d+", "<in>", name)
        assert generic in described, name
    for top in ("model", "data", "settings"):
        assert {f"{top}.{name}" for name in metadata[top]} <= described
    for top in ("sites", "weights"):
        for record in metadata[top].values():
            assert {f"{top}.*.{name}" for name in record} <= described


@pytest.mark.parametrize("shape", [(7,), (96, 32), (3, 50, 40)])
def test_probes_are_where_the_text_says(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = re.search(r"g = (0x[0-9A-F]+)", FORMAT)
    assert found
    g, count = int(found[1], 16), tensor.numel()
    flat = [float(value) for value in tensor.reshape(-1)]
    wanted = [flat[(i * g % 2**64) * count // 2**64] for i in range(1, PROBE_SIZE + 1)]
    assert f"Value i (from 1 to {PROBE_SIZE})" in FORMAT
    assert take_probe(tensor).tolist() == wanted


def test_the_content_hash_is_what_the_text_says(family: Path) -> None:
    metadata = json.loads((family / "stats" / "activation_stats.json").read_text())
    probes = load_file(family / "stats" / "model.safetensors")["probes"]
    digest = hashlib.sha256()
    for name, weight in metadata["weights"].items():
        digest.update(f"{name} {weight['shape']} {weight['dtype']} ".encode())
        digest.update(probes[weight["probe"]].numpy().tobytes())
    assert digest.hexdigest() == metadata["model"]["content_hash"]
    assert "`lm_head.weight [96, 32] float32 `" in FORMAT


def test_the_example_reads_what_the_package_reads(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", FORMAT, re.S)
    assert len(code.splitlines()) <= 16
    assert set(re.findall(r"^(?:from|import) (\w+)", code, re.M)) == {
        "json",
        "pathlib",
        "safetensors",
    }
    (tmp_path / "stats").symlink_to(family / "stats")
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(code, scope)
    statistics = Statistics("stats", family / "stats")
    record = statistics.metadata.weights[scope["weight"]]
    wanted = IMPORTANCE.values(statistics, record, "mean_abs")
    torch.testing.assert_close(torch.from_numpy(scope["mean_abs"]).float(), wanted)
