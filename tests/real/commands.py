"""The real commands, and what they wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as mergekit_yaml

from tests.support import forks


def call(program: str, *arguments: object) -> None:
    """Run a command in a process of its own; its error output is the failure's message."""
    done = forks.run(program, *arguments, limit=3600)
    assert done.returncode == 0, done.stderr


def merge(config: dict[str, Any], out: Path) -> None:
    """Run ``mergekit-yaml`` with ``config``, written beside ``out``, in this process."""
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config))
    # A process of its own would import torch and mergekit once more for every merge.
    done = CliRunner().invoke(mergekit_yaml, [str(file), str(out), "--quiet"])
    assert done.exit_code == 0, done.output or repr(done.exception)
