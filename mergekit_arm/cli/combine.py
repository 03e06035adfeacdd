"""``mergekit-arm combine DIRECTORY DIRECTORY … OUT``."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_arm.cli.output import json_option, print_json, print_tables, quiet_option, working

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
@quiet_option
@json_option
def command(
    directories: tuple[str, ...], out: Path, force: bool, quiet: bool, as_json: bool
) -> None:
    """Add statistics measured apart, and write what one run would have measured to OUT.

    All must be of one model and measured with the same settings, on data that share no row.
    DIRECTORY may also be org/name[@revision] on the Hub. Subspaces add up only if they were
    measured with --keep-sketch.
    """
    with working("Adding", quiet=quiet):
        # Imported under a spinner: these take seconds.
        from mergekit_arm.statistics.combine import combine

        metadata = combine(directories, out, force=force)
    data = metadata.data
    counts = {"sequences": data.sequences, "tokens": data.tokens, "inputs": len(metadata.sites)}
    if as_json:
        print_json({"out": out, "directories": directories, **counts})
        return
    line = "{sequences:,} sequences, {tokens:,} tokens at {inputs} inputs".format_map(counts)
    print_tables([f"{out}: {len(directories)} directories, {line}"])
