"""``mergekit-arm calibrate MODEL OUT``."""

from __future__ import annotations

from typing import Any

import click

# The same default as CalibrationOptions, whose module imports torch; a test compares them all.
_DEFAULT_DATASET = "mit-han-lab/pile-val-backup"

_EPILOG = """\b
Examples:
  mergekit-arm calibrate meta-llama/Llama-3.2-1B ./llama-stats
  mergekit-arm calibrate ./my-model ./stats --dataset ./chats.jsonl --samples 128
  mergekit-arm calibrate org/model@main+org/lora ./stats --dataset ./text.txt
"""


@click.command("calibrate", epilog=_EPILOG)
@click.argument("model")
@click.argument("out", type=click.Path())
@click.option(
    "--dataset",
    default=_DEFAULT_DATASET,
    show_default=True,
    metavar="NAME_OR_PATH",
    help="Name on the Hub, or a local .jsonl .json .txt .csv .parquet file or directory.",
)
@click.option("--subset", help="Configuration of the data set.")
@click.option("--split", help="Split of the data set.")
@click.option(
    "--text-column",
    help="Column with text, chat messages or token ids. [default: input_ids, messages or text]",
)
@click.option("--samples", type=click.IntRange(1), default=256, show_default=True)
@click.option("--sequence-length", type=click.IntRange(1), default=512, show_default=True)
@click.option(
    "--batch-size", type=click.IntRange(1), help="Sequences at once. [default: ~4096 tokens]"
)
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, mps, …")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the forward passes.",
)
@click.option(
    "--lora-merge-cache", type=click.Path(), help="Keep the merged model of model+lora here."
)
@click.option(
    "--trust-remote-code", is_flag=True, help="Run code that comes with the model (danger)."
)
@click.option("--force", is_flag=True, help="Replace statistics that exist at OUT.")
def command(**values: Any) -> None:
    """Measure MODEL's activations on calibration text and write statistics to OUT.

    MODEL is a local directory, a Hub id, id@revision, or model+lora.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with console.status("Loading libraries, data and model"):
        import transformers

        from mergekit_arm.calibration.run import CalibrationOptions, calibrate

    transformers.utils.logging.disable_progress_bar()
    columns = (
        TextColumn("Calibrating"),
        BarColumn(),
        TextColumn("{task.completed:,}/{task.total:,} tokens, {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, speed_estimate_period=60) as bar:
        task = bar.add_task("tokens", total=None, visible=False, rate="")

        def progress(done: int, total: int) -> None:
            speed = bar.tasks[task].speed
            rate = f"{speed:,.0f} tokens/s" if speed else ""
            bar.update(task, completed=done, total=total, visible=True, rate=rate)

        result = calibrate(
            CalibrationOptions(**values), progress, lambda note: console.print(note, style="yellow")
        )
    from mergekit_arm.reports.summary import calibration_summary

    console.print(
        calibration_summary(result.metadata, result.out, result.requested_sequences, result.seconds)
    )
