"""``mergekit-arm inspect STATS [OTHER]``."""

from __future__ import annotations

import click

from mergekit_arm.cli.output import json_option, print_json, quiet_option, working

_EPILOG = """\b
Examples:
  mergekit-arm inspect ./stats
  mergekit-arm inspect org/llama-stats --tensor model.layers.0.mlp.down_proj.weight
  mergekit-arm inspect ./stats-on-code ./stats-on-text --json
"""


@click.command("inspect", epilog=_EPILOG)
@click.argument("statistics")
@click.argument("other", required=False)
@click.option("--tensor", metavar="NAME", help="Say what is known of this weight.")
@quiet_option
@json_option
def command(
    statistics: str, other: str | None, tensor: str | None, quiet: bool, as_json: bool
) -> None:
    """Show what the directory STATISTICS holds: where it is from, how complete, what stands out.

    With OTHER, compare the two: are they of one model, and does it matter on what they were
    measured? Both may be directories, or org/name[@revision] on the Hub.
    """
    if other is not None and tensor is not None:
        raise click.UsageError("--tensor is of one directory: leave OTHER out")
    # Imported when there is work, so that --help is instant.
    from rich.console import Console

    with working("Reading", quiet=quiet):
        # Imported under a spinner: these take seconds.
        from mergekit_arm.cli.tables.inspect import comparison_tables, summary_tables, tensor_table
        from mergekit_arm.inspecting.comparison import compare
        from mergekit_arm.inspecting.summary import summarise
        from mergekit_arm.inspecting.tensor import look_up
        from mergekit_arm.statistics.read import open_statistics

        opened = open_statistics(statistics)
        if other is not None:
            compared = compare(opened, open_statistics(other))
            fields, tables = compared.fields(), list(comparison_tables(compared))
        elif tensor is not None:
            facts = look_up(opened, tensor)
            fields, tables = facts.fields(), [tensor_table(facts)]
        else:
            summary = summarise(opened)
            fields, tables = summary.fields(), list(summary_tables(summary))
    if as_json:
        print_json(fields)
        return
    console = Console()
    for table in tables:
        console.print(table, highlight=False)
