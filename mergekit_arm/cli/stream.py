"""``mergekit-arm stream CONFIG OUT``.

Nothing is imported late here: mergekit's own options, which this command offers, bring torch along.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
import transformers
from huggingface_hub.utils.tqdm import enable_progress_bars
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options
from rich.console import Console

from mergekit_arm.cli.progress import Display
from mergekit_arm.cli.tables.stream import plan_report, step_line, stream_summary
from mergekit_arm.errors import InputError
from mergekit_arm.streaming.config import load_config
from mergekit_arm.streaming.forecast import forecast
from mergekit_arm.streaming.layout import END_MARKER
from mergekit_arm.streaming.options import StreamOptions, WatchOptions
from mergekit_arm.streaming.references import plain_path
from mergekit_arm.streaming.stream import stream

_EPILOG = """\b
Examples:
  mergekit-arm stream stream.yml ./out --dry-run
  mergekit-arm stream stream.yml ./out --cuda
  mergekit-arm stream stream.yml ./out --watch --watch-timeout 7200
"""


@click.command("stream", cls=PrettyPrintHelp, epilog=_EPILOG)
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
    help=f"File that appears when training ends. [default: {END_MARKER} beside the checkpoints]",
)
@click.option(
    "--watch-timeout",
    type=click.FloatRange(0, min_open=True),
    default=WatchOptions.timeout,
    show_default=True,
    metavar="SECONDS",
    help="Without a new checkpoint for so long, training counts as ended.",
)
@click.option(
    "--poll",
    type=click.FloatRange(0, min_open=True),
    default=WatchOptions.poll,
    show_default=True,
    metavar="SECONDS",
    help="Between looks for new checkpoints.",
)
@click.option("--finish", is_flag=True, help="Make OUT/model of the steps there are; take no more.")
@click.option("--strict", is_flag=True, help="End at a checkpoint that cannot be merged.")
@click.option("--fed", is_flag=True, help="With --watch: StreamCallback hands the checkpoints on.")
@add_merge_options  # type: ignore[untyped-decorator]  # mergekit is untyped
def command(
    merge_options: MergeOptions,
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
) -> None:
    """Merge a training run's checkpoints one after another, each merge a step.

    CONFIG is a mergekit configuration with checkpoints, learning_rate, calibration and
    evaluation. OUT/model is the result. The same command resumes an interrupted stream, and goes
    on with checkpoints that have come since. A bad checkpoint is skipped, and said.
    """
    transformers.utils.logging.disable_progress_bar()  # which also silences downloads
    if not merge_options.quiet:
        enable_progress_bars()
    merge_options.apply_global_options()
    if not watch:
        _refuse_without_watch()
    elif not (watch_timeout < math.inf and poll < math.inf):
        raise InputError("--watch-timeout and --poll are finite numbers of seconds")
    watching = WatchOptions(end_marker, watch_timeout, poll, fed=fed) if watch else None
    options = StreamOptions(merge_options, keep, watching, finish, strict)
    console = Console(stderr=True)
    if dry_run:
        if not _print_plan(console, config, out, options):
            raise click.exceptions.Exit(2)
        return

    def line(text: str, style: str | None = None) -> None:
        # Paths may hold brackets, which are not markup.
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    with Display(console) as display:
        result = stream(
            config,
            out,
            options,
            say=lambda note: line(note, "yellow"),
            progress=display.tokens,
            evaluating=display.stage,
            on_step=lambda record: line(step_line(record)),
        )
    console.print(stream_summary(result))


def _refuse_without_watch() -> None:
    context = click.get_current_context()
    for name in ("end_marker", "watch_timeout", "poll", "fed"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise InputError(f"--{name.replace('_', '-')} belongs to --watch: add that")


def _print_plan(console: Console, config: str, out: str, options: StreamOptions) -> bool:
    report = forecast(load_config(config), Path(plain_path(out)), options)
    for part in plan_report(report):
        console.print(part, highlight=False, soft_wrap=True)
    return not report.problems
