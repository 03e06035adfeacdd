"""``mergekit-arm check CONFIG``."""

from __future__ import annotations

import click

from mergekit_arm.cli.merge_options import OPTIONS, size
from mergekit_arm.cli.output import json_option, print_json, quiet_option, working

_EPILOG = """\b
Examples:
  mergekit-arm check merge.yml
  mergekit-arm check merge.yml --out /data/merged --json
  mergekit-arm check merge.yml --lora-merge-cache ./adapters
"""


@click.command("check", epilog=_EPILOG)
@click.argument("config", type=click.Path())
@click.option(
    "--out",
    type=click.Path(),
    help="Where the result is to lie: its disk is looked at. [default: here]",
)
@quiet_option
@json_option
@click.option("--allow-crimes", is_flag=True, help="As mergekit-yaml will be given it.")
@click.option("--trust-remote-code", is_flag=True, help="Run code of the models (danger).")
@click.option(
    "--lora-merge-cache",
    type=click.Path(),
    metavar="DIRECTORY",
    help="As mergekit-yaml will be given it.",
)
@click.option(
    "--out-shard-size",
    type=size,
    default=OPTIONS["out_shard_size"][2],
    metavar="SIZE",
    help="As mergekit-yaml will be given it. [default: 5B]",
)
def command(config: str, out: str | None, quiet: bool, as_json: bool, **merge: object) -> None:
    """Say in seconds what is wrong with CONFIG, a merge or stream configuration.

    Every mergekit configuration will do, whichever its method. No weight is read: of models, the
    headers and configurations are enough. Exit status 0 says that the merge will be accepted and
    that everything in CONFIG is read; 2 that not.
    """
    with working("Checking", quiet=quiet):
        # Imported under a spinner: these take seconds.
        import transformers
        from mergekit.options import MergeOptions

        from mergekit_arm.checking.check import check

        transformers.utils.logging.set_verbosity_error()  # what they warn of is not asked for
        checked = check(config, MergeOptions(**merge), out)
    if as_json:
        document = {
            "accepted": checked.accepted,
            "findings": [one.fields() for one in checked.findings],
            "room": [one.fields() for one in checked.rooms],
        }
        print_json(document)
    else:
        for one in checked.findings:
            click.echo(str(one))
        for room in checked.rooms:
            click.echo(f"{config}: {room}")
        errors = sum(one.severity == "error" for one in checked.findings)
        click.echo(f"{config}: {f'{errors} errors' if errors else 'nothing is wrong with it'}")
    if not checked.accepted:
        raise click.exceptions.Exit(2)
