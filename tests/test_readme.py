"""What README.md tells people to run is what is tested."""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_ci_runs_readme_command() -> None:
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command.endswith("pytest")
    assert command in (ROOT / "README.md").read_text().splitlines()
