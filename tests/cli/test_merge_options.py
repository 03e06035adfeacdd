"""Our copy of mergekit's options is mergekit's."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner
from mergekit.options import MergeOptions, PrettyPrintHelp
from mergekit.options import add_merge_options as mergekits

from mergekit_arm.cli.merge_options import MergeCommand, add_merge_options, merge_options
from mergekit_arm.cli.stream import command as stream_command
from mergekit_arm.cli.tune import command as tune_command
from mergekit_arm.errors import InputError
from mergekit_arm.streaming.layout import END_MARKER
from mergekit_arm.streaming.options import WatchOptions
from mergekit_arm.tuning.config import SAMPLERS


@click.command(cls=PrettyPrintHelp)
@mergekits  # type: ignore[untyped-decorator]
def theirs(merge_options: MergeOptions) -> None:
    click.echo(merge_options.model_dump_json())


@click.command(cls=MergeCommand)
@add_merge_options
def ours(**values: object) -> None:
    click.echo(merge_options(values).model_dump_json())


@pytest.mark.parametrize(
    "line",
    ["--help", "", "--cuda -vv -j 3 --no-copy-tokenizer --random-seed 5", "--gpu-rich",
     "--out-shard-size 12M --lora-merge-cache x --device auto"],
)  # fmt: skip
def test_the_same_is_said_and_made(line: str) -> None:
    results = [CliRunner().invoke(one, line.split(), prog_name="x") for one in (theirs, ours)]
    assert [one.exit_code for one in results] == [0, 0], results[1].output
    assert results[0].output == results[1].output


def test_a_size_that_is_none_is_refused() -> None:
    done = CliRunner().invoke(ours, ["--out-shard-size", "big"])
    assert done.exit_code == 2
    assert "500M or 5B" in done.output


def test_an_option_that_mergekit_has_lost_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(MergeOptions.model_fields, "gpu_rich")
    CliRunner().invoke(ours, [], catch_exceptions=False)
    done = CliRunner().invoke(ours, ["--gpu-rich"])
    assert done.exit_code == InputError.exit_code
    assert "no --gpu-rich" in done.output


def test_what_is_written_here_for_fast_help_is_the_librarys() -> None:
    defaults = {one.name: one for one in stream_command.params}
    assert defaults["watch_timeout"].default == WatchOptions.timeout
    assert defaults["poll"].default == WatchOptions.poll
    assert END_MARKER in str(getattr(defaults["end_marker"], "help", ""))
    (sampler,) = (one for one in tune_command.params if one.name == "sampler")
    assert isinstance(sampler.type, click.Choice)
    assert tuple(sampler.type.choices) == SAMPLERS
