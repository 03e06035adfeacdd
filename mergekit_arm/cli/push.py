"""``mergekit-arm push STATS org/name``."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_arm.cli.output import json_option, print_json, quiet_option, working

_EPILOG = """\b
Examples:
  mergekit-arm push ./stats my-org/llama-stats --dry-run
  mergekit-arm push ./stats my-org/llama-stats --private --license apache-2.0
"""


@click.command("push", epilog=_EPILOG)
@click.argument("statistics", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--license", "licence", metavar="ID", help="Say it in the card, as apache-2.0.")
@click.option("--dry-run", is_flag=True, help="Print what would be uploaded, and stop.")
@click.option("--force", is_flag=True, help="Replace files of a repository that has some.")
@quiet_option
@json_option
def command(
    statistics: Path,
    repository: str,
    private: bool,
    licence: str | None,
    dry_run: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Publish the directory STATISTICS on the Hub, as a repository ORG/NAME.

    Every value is compared with its digest first. Everything goes up in one commit, with a card
    that has the YAML which uses it. Log in before with `hf auth login`.
    """
    # Imported when there is work, so that --help is instant.
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from mergekit_arm.units import size_text

    if quiet:
        disable_progress_bars()
    with working("Checking", quiet=quiet):
        # Imported under a spinner: these take seconds.
        from mergekit_arm.publishing.push import CARD, prepare_upload, push

        upload = prepare_upload(statistics, repository, licence)
    sizes = {name: file.stat().st_size for name, file in upload.files.items()}
    if dry_run:
        if as_json:
            print_json({"repository": repository, "files": sizes, "card": upload.card})
            return
        for name, size in sizes.items():
            click.echo(f"{name}  {size_text(size)}")
        click.echo(f"{CARD}:\n{upload.card}")
        return
    with working(f"Uploading {size_text(upload.size)}", quiet=quiet):
        address = push(upload, private=private, force=force)
    if as_json:
        print_json({"repository": repository, "files": sizes, "address": address})
    else:
        click.echo(address)
