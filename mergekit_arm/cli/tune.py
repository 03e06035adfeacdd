"""``mergekit-arm tune CONFIG OUT``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_arm.cli.merge_options import MergeCommand, add_merge_options, merge_options
from mergekit_arm.cli.output import json_option, print_json, print_tables
from mergekit_arm.errors import InputError
from mergekit_arm.units import parse_duration

if TYPE_CHECKING:
    from mergekit_arm.tuning.trials import TrialRecord

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


@click.command("tune", cls=MergeCommand, epilog=_EPILOG)
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path())
@click.option("--trials", type=click.IntRange(1), help="How many. [default: the file's, or 40]")
@click.option(
    "--timeout",
    metavar="TIME",
    callback=lambda _context, _option, text: None if text is None else parse_duration(text),
    help="Begin no trial after so long (90s, 30m, 8h).",
)
@click.option(
    "--sampler",
    type=click.Choice(["tpe", "random", "grid", "cmaes"]),
    help="[default: the file's, or tpe]",
)
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
@json_option
@add_merge_options
def command(config: str, out: str, dry_run: bool, as_json: bool, **values: Any) -> None:
    """Search the numbers of a merge for what judges best.

    CONFIG is a mergekit configuration with {tune: [LOW, HIGH]} in place of numbers, and a section
    tuning that names held-out data or commands. OUT/best.yml and OUT/model are the result. The
    same command continues an interrupted search; run more than once, the processes share it.
    """
    # Imported when there is work, so that --help is instant.
    import transformers
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from rich.console import Console

    from mergekit_arm.checking.check import check_trials
    from mergekit_arm.checking.document import read_documents
    from mergekit_arm.cli.progress import Display
    from mergekit_arm.cli.tables import tune as tables
    from mergekit_arm.tuning.forecast import forecast_tuning
    from mergekit_arm.tuning.options import TuneOptions
    from mergekit_arm.tuning.tune import plan_tuning, tune

    quiet = values["quiet"]
    merge = merge_options(values)
    transformers.utils.logging.disable_progress_bar()  # which also silences downloads
    if not quiet:
        enable_progress_bars()
    merge.apply_global_options()
    options = TuneOptions(merge, **values)
    console, place = Console(stderr=True), Path(out).absolute()
    plan, planned = plan_tuning(config, place, options)
    for error in check_trials(read_documents(config)[0], plan, planned):
        raise InputError(str(error).replace(": error: ", ": ", 1))
    if dry_run:
        forecast = forecast_tuning(plan, place, planned, with_model=options.model)
        if as_json:
            print_json(tables.space_fields(plan, forecast))
        else:
            print_tables(tables.space_report(plan, forecast))
        return

    def line(text: str, style: str | None = None) -> None:
        # Paths may hold brackets, which are not markup.
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    with Display(Console(stderr=True, quiet=True) if quiet else console) as display:

        def ended(trial: TrialRecord, best: TrialRecord | None, done: int, budget: int) -> None:
            if not quiet or trial.reason is not None:
                line(
                    tables.trial_line(trial, best, done, budget), "yellow" if trial.reason else None
                )
            if trial.study == "tune":
                gain = best.gain if best is not None else None
                note = "" if gain is None else f", best {gain:+.4f}"
                display.whole("Trials", done, budget, note)

        result = tune(
            config,
            out,
            options,
            say=lambda note: line(note, "yellow"),
            tell=lambda name, done, total: display.stage("Scoring", done, total),
            on_trial=ended,
        )
    if as_json:
        print_json(vars(result))
    else:
        print_tables(tables.tune_summary(result))
