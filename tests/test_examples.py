"""``example_configs/README.md`` and the files beside it say the same."""

from __future__ import annotations

import re

from click.testing import CliRunner

from mergekit_arm.cli.calibrate import command as calibrate
from mergekit_arm.cli.stream import command as stream
from mergekit_arm.cli.tune import command as tune
from tests.support.paths import EXAMPLES

TEXT = (EXAMPLES / "README.md").read_text(encoding="utf-8")


def test_every_example_has_its_line_and_every_line_its_example() -> None:
    rows = re.findall(r"^\| (.+) \| \[`(.+)`\]\((.+)\) \| (.+) \|$", TEXT, re.M)
    assert [name for _, name, _, _ in rows] == [link for _, _, link, _ in rows]
    listed = [name for _, name, _, _ in rows]
    assert len(listed) == len(set(listed))
    assert set(listed) == {file.name for file in EXAMPLES.iterdir()} - {"README.md"}


def test_the_commands_name_files_and_options_that_exist() -> None:
    lines = [
        line.split()
        for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S)
        for line in block.splitlines()
    ]
    assert len(lines) == 9
    helps = {
        "calibrate": CliRunner().invoke(calibrate, ["--help"]).output,
        "stream": CliRunner().invoke(stream, ["--help"]).output,
        "tune": CliRunner().invoke(tune, ["--help"]).output,
    }
    for program, *words in lines:
        assert program in ("mergekit-arm", "mergekit-yaml", "mergekit-multi")
        for word in words:
            if word.startswith("example_configs/"):
                assert (EXAMPLES.parent / word).is_file()
            if word.startswith("--") and program == "mergekit-arm":
                assert word in helps[words[0]]
