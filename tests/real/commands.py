"""The real commands, and what they wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from torch import Tensor


def call(program: str, *arguments: object) -> None:
    """Run a command of this environment; its error output is the failure's message."""
    command = [str(Path(sys.executable).parent / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def merge(config: dict[str, Any], out: Path) -> None:
    """Run ``mergekit-yaml`` with ``config``, written beside ``out``."""
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config))
    call("mergekit-yaml", file, out)


def weights(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
