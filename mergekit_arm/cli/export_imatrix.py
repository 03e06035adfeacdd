"""``mergekit-arm export-imatrix STATS OUT.gguf``."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_arm.cli.output import json_option, print_json, print_tables, quiet_option, working

_EPILOG = """\b
Examples:
  mergekit-arm export-imatrix ./stats ./imatrix.gguf
  llama-quantize --imatrix ./imatrix.gguf model-f16.gguf model-q4.gguf Q4_K_M
"""


@click.command("export-imatrix", epilog=_EPILOG)
@click.argument("statistics")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace OUT if it is an importance matrix.")
@quiet_option
@json_option
def command(statistics: str, out: Path, force: bool, quiet: bool, as_json: bool) -> None:
    """Write the directory STATISTICS as an importance matrix for llama.cpp's quantisation.

    STATISTICS may also be org/name[@revision] on the Hub. OUT is a GGUF file.
    """
    with working("Writing", quiet=quiet):
        # Imported under a spinner: these take seconds.
        from mergekit_arm.imatrix.exporting import export_imatrix
        from mergekit_arm.statistics.read import open_statistics

        matrix = export_imatrix(open_statistics(statistics), out, force=force)
    if as_json:
        print_json({"out": out, "weights": len(matrix.entries)})
    else:
        print_tables([f"{out}: {len(matrix.entries)} weights"])
