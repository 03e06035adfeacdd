"""``mergekit-arm combine DIRECTORY DIRECTORY … OUT``."""

from __future__ import annotations

from pathlib import Path

import click

_EPILOG = """\b
Examples:
  mergekit-arm combine ./stats-1 ./stats-2 ./stats
\b
On two hosts without a shared network:
  mergekit-arm calibrate ./model ./stats-1 --dataset ./text.jsonl --keep-sketch --part 1/2
  mergekit-arm calibrate ./model ./stats-2 --dataset ./text.jsonl --keep-sketch --part 2/2
"""


@click.command("combine", epilog=_EPILOG)
@click.argument("directories", nargs=-1, required=True, metavar="DIRECTORY DIRECTORY …")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace statistics that exist at OUT.")
def command(directories: tuple[str, ...], out: Path, force: bool) -> None:
    """Add statistics measured apart, and write what one run would have measured to OUT.

    All must be of one model and measured with the same settings, on data that share no row.
    DIRECTORY may also be org/name[@revision] on the Hub. Subspaces add up only if they were
    measured with --keep-sketch.
    """
    # Imported when there is work, so that --help is instant.
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("Adding"):
        # Imported under a spinner: these take seconds.
        from mergekit_arm.statistics.combine import combine

        metadata = combine(directories, out, force=force)
    data = metadata.data
    console.print(
        f"{out}: {len(directories)} directories, {data.sequences:,} sequences, "
        f"{data.tokens:,} tokens at {len(metadata.sites)} inputs",
        highlight=False,
    )
