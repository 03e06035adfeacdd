"""``mergekit-arm demo``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from mergekit_arm.cli.output import (
    json_option,
    print_json,
    print_tables,
    quiet_option,
    working,
)

_EPILOG = """\b
Examples:
  mergekit-arm demo
  mergekit-arm demo --out /tmp/demo --seed 7 --force
"""


@click.command("demo", epilog=_EPILOG)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("mergekit-arm-demo"),
    show_default=True,
    help="Directory for models, statistics, configs and merges (about 40 MB).",
)
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True)
@click.option("--force", is_flag=True, help="Replace an earlier demo at --out.")
@quiet_option
@json_option
def command(out: Path, seed: int, force: bool, quiet: bool, as_json: bool) -> None:
    """Train, calibrate, merge and tune a very small model, in two minutes and without a network.

    Trains a base and two specialists of a very small Llama on the text of Python's standard
    library, the specialists on little of it, measures their activations, merges with and without
    them through mergekit, tunes three methods, and prints a table of held-out losses.
    """
    with working("Loading libraries", quiet=quiet):
        # Imported under a spinner: these take seconds.
        import transformers
        from rich.console import Console

        from mergekit_arm.cli.tables.demo import closing, loss_table
        from mergekit_arm.demo.demo import DemoOptions, run_demo

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    begun = time.perf_counter()
    losses = run_demo(DemoOptions(out, seed, force), Console(stderr=True, quiet=quiet))
    seconds = time.perf_counter() - begun
    if as_json:
        print_json({"out": out, "losses": losses, "seconds": seconds})
    else:
        print_tables([loss_table(losses), closing(out, losses, seconds)])
