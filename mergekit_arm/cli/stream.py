"""``mergekit-arm stream CONFIG OUT``."""

from __future__ import annotations

import math
from typing import Any

import click

from mergekit_arm.cli.merge_options import MergeCommand, add_merge_options, merge_options
from mergekit_arm.cli.output import json_option, print_json, print_tables
from mergekit_arm.errors import InputError

_EPILOG = """\b
Examples:
  mergekit-arm stream stream.yml ./out --dry-run
  mergekit-arm stream stream.yml ./out --cuda
  mergekit-arm stream stream.yml ./out --watch --watch-timeout 7200
"""


@click.command("stream", cls=MergeCommand, epilog=_EPILOG)
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@click.option(
    "--keep",
    type=click.Choice(["all", "best", "last"]),
    default="last",
    show_default=True,
    help="Which steps' float32 weights stay in OUT/steps.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and what is wrong with it.")
@click.option("--watch", is_flag=True, help="Take checkpoints as a training run writes them.")
@click.option(
    "--end-marker",
    type=click.Path(),
    help="File that appears when training ends. [default: stream.end beside the checkpoints]",
)
@click.option(
    "--watch-timeout",
    type=click.FloatRange(0, min_open=True),
    default=3600.0,
    show_default=True,
    metavar="SECONDS",
    help="Without a new checkpoint for so long, training counts as ended.",
)
@click.option(
    "--poll",
    type=click.FloatRange(0, min_open=True),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Between looks for new checkpoints.",
)
@click.option("--finish", is_flag=True, help="Make OUT/model of the steps there are; take no more.")
@click.option("--strict", is_flag=True, help="End at a checkpoint that cannot be merged.")
@click.option("--fed", is_flag=True, help="With --watch: StreamCallback hands the checkpoints on.")
@json_option
@add_merge_options
def command(
    config: str,
    out: str,
    keep: Any,
    dry_run: bool,
    watch: bool,
    end_marker: str | None,
    watch_timeout: float,
    poll: float,
    finish: bool,
    strict: bool,
    fed: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Merge a training run's checkpoints one after another, each merge a step.

    CONFIG is a mergekit configuration with checkpoints, learning_rate, calibration and
    evaluation. OUT/model is the result. The same command resumes an interrupted stream, and goes
    on with checkpoints that have come since. A bad checkpoint is skipped, and said.
    """
    if not watch:
        _refuse_without_watch()
    elif not (watch_timeout < math.inf and poll < math.inf):
        raise InputError("--watch-timeout and --poll are finite numbers of seconds")
    # Imported when there is work, so that --help is instant.
    import transformers
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from rich.console import Console

    from mergekit_arm.cli.progress import Display
    from mergekit_arm.cli.tables import stream as tables
    from mergekit_arm.streaming.forecast import forecast_stream
    from mergekit_arm.streaming.options import StreamOptions, WatchOptions
    from mergekit_arm.streaming.stream import stream

    merge = merge_options(values)
    transformers.utils.logging.disable_progress_bar()  # which also silences downloads
    if not merge.quiet:
        enable_progress_bars()
    merge.apply_global_options()
    watching = WatchOptions(end_marker, watch_timeout, poll, fed=fed) if watch else None
    options = StreamOptions(merge, keep, watching, finish, strict)
    if dry_run:
        report = forecast_stream(config, out, options)
        if as_json:
            print_json(tables.plan_fields(report))
        else:
            print_tables(tables.plan_report(report))
        if report.problems:
            raise click.exceptions.Exit(2)
        return
    console = Console(stderr=True)
    shown = Console(stderr=True, quiet=True) if merge.quiet else console

    def line(console: Console, text: str, style: str | None = None) -> None:
        # Paths may hold brackets, which are not markup.
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    with Display(shown) as display:
        result = stream(
            config,
            out,
            options,
            say=lambda note: line(console, note, "yellow"),
            progress=display.tokens,
            evaluating=display.stage,
            on_step=lambda record: line(shown, tables.step_line(record)),
        )
    if as_json:
        print_json(vars(result))
    else:
        print_tables([tables.stream_summary(result)])


def _refuse_without_watch() -> None:
    context = click.get_current_context()
    for name in ("end_marker", "watch_timeout", "poll", "fed"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise InputError(f"--{name.replace('_', '-')} belongs to --watch: add that")
