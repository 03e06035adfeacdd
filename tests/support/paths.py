"""Where the repository's files lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mergekit_arm"
EXAMPLES = ROOT / "example_configs"
REFERENCE = ROOT / "tests" / "reference"
