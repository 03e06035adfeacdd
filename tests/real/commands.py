"""The real commands, and what they wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml


def call(program: str, *arguments: object) -> None:
    """Run a command of this environment; its error output is the failure's message."""
    command = [str(Path(sys.executable).parent / program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def merge(config: dict[str, Any], out: Path) -> None:
    """Run ``mergekit-yaml`` with ``config``, written beside ``out``, in this process."""
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config))
    # A process of its own would import torch and mergekit once more for every merge.
    done = CliRunner().invoke(mergekit_yaml, [str(file), str(out), "--quiet"])
    assert done.exit_code == 0, done.output or repr(done.exception)
