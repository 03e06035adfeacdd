"""``mergekit-arm demo``."""

from __future__ import annotations

from pathlib import Path

import click

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
    help="Directory for models, statistics, configs and merges (about 25 MB).",
)
@click.option("--seed", type=click.IntRange(0), default=42, show_default=True)
@click.option("--force", is_flag=True, help="Replace an earlier demo at --out.")
def command(out: Path, seed: int, force: bool) -> None:
    """Train, calibrate and merge a very small model, in two minutes and without a network.

    Trains a base and two specialists of a very small Llama on the text of Python's standard
    library, measures the base's activations, merges with and without AIM through mergekit, and
    prints a table of held-out losses.
    """
    # Imported when there is work, so that --help is instant.
    from rich.console import Console

    console = Console()
    with console.status("Loading libraries"):
        # Imported under a spinner: these take seconds.
        import transformers

        from mergekit_arm.demo.demo import DemoOptions, run_demo

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    run_demo(DemoOptions(out, seed, force), console)
