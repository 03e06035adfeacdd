"""The contributor text's own code, put where it says: a statistic and a method that uses it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tests.support.merges import weights
from tests.support.paths import PACKAGE

TEXT = (PACKAGE / "README.md").read_text(encoding="utf-8")
STRENGTH = 0.8
BOTH = """
import sys
from mergekit.scripts.run_yaml import main
from mergekit_arm.cli.main import cli
cli.main(sys.argv[1:], standalone_mode=False)
main.main(["config.yml", "merged"], standalone_mode=False)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.S)


def grown_package(folder: Path) -> Path:
    """Copy the package and add to it what the tutorial adds."""
    package = shutil.copytree(
        PACKAGE, folder / "mergekit_arm", ignore=shutil.ignore_patterns("__pycache__")
    )
    kind, line, method, methods = blocks("python")
    (package / "statistics" / "kinds" / "largest.py").write_text(kind)
    registry = package / "statistics" / "kinds" / "__init__.py"
    registry.write_text(
        f"{registry.read_text()}"
        "from mergekit_arm.statistics.kinds.largest import LARGEST  # noqa\n"
        f"{line}"
    )
    (package / "methods" / "peak_guard.py").write_text(method)
    init = package / "methods" / "__init__.py"
    old = re.search(r"^METHODS.*$", init.read_text(), re.M)
    assert old is not None
    *listed, added = re.findall(r"\w+", methods.partition("=")[2])
    assert set(listed) <= set(re.findall(r"\w+", old[0]))
    grown = re.sub(r"\(([^()]*?),?\)$", rf"(\1, {added})", old[0])
    assert grown != old[0]
    imported = "from mergekit_arm.methods.peak_guard import PeakGuard\n"
    init.write_text(init.read_text().replace(old[0], imported + grown))
    return package


def run(package: Path, folder: Path, *command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def largest_inputs(folder: Path, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Measure with hooks of our own what the statistic says it does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: dict[str, torch.Tensor] = {}

    def hook(name: str):  # type: ignore[no-untyped-def]
        def see(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            largest = inputs[0].abs().flatten(0, -2).amax(0)
            found[name] = torch.maximum(found.get(name, largest), largest)

        return see

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or "norm" in name:
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    with torch.inference_mode():
        for row in rows:
            model(torch.tensor([row]))
    return found


def test_the_tutorial_works(family: Path, token_file: Path, tmp_path: Path) -> None:
    package = grown_package(tmp_path)
    folder = tmp_path / "work"
    folder.mkdir()
    for name in ("base", "a", "b"):
        (folder / name).symlink_to(family / name)
    shutil.copy(token_file, folder / "calibration.jsonl")
    command = next(block for block in blocks("sh") if "--statistics largest" in block)
    assert command.startswith("mergekit-arm ")
    (folder / "config.yml").write_text(blocks("yaml")[0])
    # One process for both: each would import torch and mergekit anew.
    run(package, folder, "-c", BOTH, *command.split()[1:])

    stored = load_file(folder / "stats" / "model.safetensors")
    assert {name.rpartition(".")[2] for name in stored} == {"largest", "probes", "rows"}
    rows = [json.loads(line)["input_ids"] for line in token_file.read_text().splitlines()]
    measured = largest_inputs(family / "base", rows)
    base, a, b = (weights(family / name) for name in ("base", "a", "b"))
    merged = weights(folder / "merged")
    for name, tensor in merged.items():
        step = (a[name].double() + b[name].double()) / 2 - base[name].double()
        gain = torch.ones(())
        if name in measured:
            gain = 1 - STRENGTH * measured[name].double() / measured[name].max()
        wanted = base[name].double() + step * gain
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6, msg=name)
    assert len(measured) > 10
