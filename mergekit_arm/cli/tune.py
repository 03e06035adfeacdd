"""``mergekit-arm tune CONFIG OUT``.

Nothing is imported late here: mergekit's own options, which this command offers, bring torch along.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import transformers
from huggingface_hub.utils.tqdm import enable_progress_bars
from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options
from rich.console import Console

from mergekit_arm.cli.progress import Display
from mergekit_arm.cli.tables.tune import space_report, trial_line, tune_summary
from mergekit_arm.tuning.config import SAMPLERS
from mergekit_arm.tuning.forecast import forecast_tuning
from mergekit_arm.tuning.options import TuneOptions
from mergekit_arm.tuning.trials import TrialRecord
from mergekit_arm.tuning.tune import plan_tuning, tune
from mergekit_arm.units import parse_duration

_EPILOG = """\b
Examples:
  mergekit-arm tune tune.yml ./out --dry-run
  mergekit-arm tune tune.yml ./out --trials 100 --cuda
  mergekit-arm tune tune.yml ./out --sampler grid --no-model
\b
A number becomes unknown by {tune: [LOW, HIGH]}; the section tuning names the data:
  parameters: {weight: {tune: [0.2, 1.2]}}
  tuning: {evaluation: {code: {dataset: ./code.jsonl}}, trials: 40}
"""


@click.command("tune", cls=PrettyPrintHelp, epilog=_EPILOG)
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--trials", type=click.IntRange(1), help="How many. [default: the file's, or 40]")
@click.option(
    "--timeout",
    metavar="TIME",
    callback=lambda _context, _option, text: None if text is None else parse_duration(text),
    help="Begin no trial after so long (90s, 30m, 8h).",
)
@click.option("--sampler", type=click.Choice(SAMPLERS), help="[default: the file's, or tpe]")
@click.option("--seed", type=click.IntRange(0), help="[default: the file's, or 42]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the forward passes. [default: the file's, or auto]",
)
@click.option(
    "--baseline/--no-baseline",
    default=None,
    help="Try plain task arithmetic at 0.3, 0.5, 0.7 and 1 as well. [default: as the file says]",
)
@click.option("--model/--no-model", default=True, help="Write the best merge to OUT/model.")
@click.option("--dry-run", is_flag=True, help="Print the space, trials, time and disk.")
@click.option("--force", is_flag=True, help="Replace another search at OUT.")
@add_merge_options  # type: ignore[untyped-decorator]  # mergekit is untyped
def command(
    merge_options: MergeOptions, config: str, out: str, dry_run: bool, **values: Any
) -> None:
    """Search the numbers of a merge for what judges best.

    CONFIG is a mergekit configuration with {tune: [LOW, HIGH]} in place of numbers, and a section
    tuning that names held-out data or commands. OUT/best.yml and OUT/model are the result. The
    same command continues an interrupted search; run more than once, the processes share it.
    """
    transformers.utils.logging.disable_progress_bar()  # which also silences downloads
    if not merge_options.quiet:
        enable_progress_bars()
    merge_options.apply_global_options()
    options = TuneOptions(merge_options, **values)
    console = Console(stderr=True)
    if dry_run:
        place = Path(out).absolute()
        plan, merge = plan_tuning(config, place, options)
        forecast = forecast_tuning(plan, place, merge, with_model=options.model)
        for part in space_report(plan, forecast):
            console.print(part, highlight=False, soft_wrap=True)
        return

    def line(text: str, style: str | None = None) -> None:
        # Paths may hold brackets, which are not markup.
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    with Display(console) as display:

        def ended(trial: TrialRecord, best: TrialRecord | None, budget: int) -> None:
            if not merge_options.quiet or trial.reason is not None:
                line(trial_line(trial, best, budget), "yellow" if trial.reason else None)
            if trial.study == "tune":
                gain = f", best {best.gain:+.4f}" if best is not None and best.gain else ""
                display.whole("Trials", trial.number + 1, budget, gain)

        result = tune(
            config,
            out,
            options,
            say=lambda note: line(note, "yellow"),
            tell=lambda name, done, total: display.stage("Scoring", done, total),
            on_trial=ended,
        )
    for part in tune_summary(result):
        console.print(part, highlight=False, soft_wrap=True)
