"""Run mergekit's commands on models of a test family, and say what must come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import torch
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file
from torch import Tensor

from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics

OMEGA = 0.3


def run(
    command: click.Command, document: str, folder: Path, *options: str, multi: bool = False
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.yml").write_text(document)
    out = folder / "out"
    target = ["--out-path", str(out), "-I", str(folder / "stages")] if multi else [str(out)]
    done = CliRunner().invoke(command, [str(folder / "config.yml"), *target, "--quiet", *options])
    assert done.exit_code == 0, done.output or repr(done.exception)
    return out


def refused(document: str, folder: Path) -> str:
    (folder / "config.yml").write_text(document)
    done = CliRunner().invoke(mergekit_yaml, [str(folder / "config.yml"), str(folder / "out")])
    assert done.exit_code == 2
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    return line


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "merge_method": "aim",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / "a"), "parameters": {"weight": 1.0}}],
        "parameters": {"activation_stats": str(folder / "stats"), "omega": OMEGA},
        "dtype": "float32",
        **changes,
    }


def weights(path: Path) -> dict[str, Tensor]:
    merged: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        merged |= load_file(file)
    return merged


def as_merged(path: Path) -> dict[str, Tensor]:
    """A model's tensors under the names that mergekit gives them: it stacks a list of experts."""
    found = weights(path)
    for name in [one for one in found if one.endswith("block_sparse_moe.gate.weight")]:
        found[name.replace("block_sparse_moe", "mlp")] = found.pop(name)
    for start in sorted({one.partition(".experts.")[0] for one in found if ".experts." in one}):
        parts = (
            ("w1", "w2", "w3") if "block_sparse" in start else ("gate_proj", "down_proj", "up_proj")
        )
        count = sum(one.startswith(f"{start}.experts.") for one in found) // 3
        gate, down, up = (
            torch.stack([found.pop(f"{start}.experts.{i}.{w}.weight") for i in range(count)])
            for w in parts
        )
        stacked = f"{start.replace('block_sparse_moe', 'mlp')}.experts"
        found[f"{stacked}.gate_up_proj"], found[f"{stacked}.down_proj"] = (
            torch.cat([gate, up], 1),
            down,
        )
    return found


def relaxed(folder: Path, name: str, base: Tensor, merged: Tensor, omega: float = OMEGA) -> Tensor:
    """AIM's formula in float64, from what the statistics say of the tensor of this name."""
    statistics = Statistics("stats", folder / "stats")
    record = statistics.metadata.weights[name]
    if record.site is None:
        return merged.double()
    importance = IMPORTANCE.values(statistics, record, "mean_abs").double()
    gain = 1 - (1 - omega) * importance / importance.max()
    return base.double() + (merged.double() - base.double()) * gain


def assert_relaxed(found: Tensor, folder: Path, name: str, omega: float = OMEGA) -> None:
    base, other = (weights(folder / model)[name] for model in ("base", "a"))
    expected = relaxed(folder, name, base, other, omega)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
