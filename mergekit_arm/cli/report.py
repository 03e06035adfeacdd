"""``mergekit-arm report DIRECTORY -o report.html``."""

from __future__ import annotations

from pathlib import Path

import click

from mergekit_arm.cli.output import json_option, print_json, quiet_option, working

_EPILOG = """\b
Examples:
  mergekit-arm report ./stats -o stats.html
  mergekit-arm report ./merged -o merged.html
  mergekit-arm report ./stream-out -o stream.html --force
  mergekit-arm report ./tune-out -o tune.html
"""


@click.command("report", epilog=_EPILOG)
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE",
              help="Where to write the page.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace FILE if it is a page.")
@quiet_option
@json_option
def command(directory: Path, output: Path, force: bool, quiet: bool, as_json: bool) -> None:
    """Write one HTML page with figures on what DIRECTORY holds.

    DIRECTORY may be statistics, a model that mergekit merged, or what `stream` or `tune` wrote;
    which of them it is shows by its files. The page holds everything that it shows, loads nothing
    from anywhere, follows the reader's light or dark setting, and prints on white.

    Every figure has a button in the page, "Save as PNG". No PNG is written without a browser;
    `stream` and `tune` leave stream.png and tune.png of their own.

    Of a merged model, the page says how far each tensor moved from the base. Where all inputs and
    the statistics are still on this machine it merges once more, in memory, to say what AIM held
    back, which takes about as long as the merge took; nothing is downloaded, and where something
    is gone the page says so. Adapters are merged into a temporary directory for it.

    Needs plotly: pip install "mergekit-arm[report]".
    """
    with working("Reading", quiet=quiet) as status:
        # Imported under a spinner: these take seconds.
        import transformers

        from mergekit_arm.reporting.report import report
        from mergekit_arm.units import size_text

        transformers.utils.logging.disable_progress_bar()  # of loading, where there are adapters
        kind = report(
            directory,
            output,
            force=force,
            progress=lambda done, total: status.update(f"Reading tensor {done} of {total}"),
        )
    size = output.stat().st_size
    if as_json:
        print_json({"file": output, "kind": kind, "bytes": size})
    else:
        click.echo(f"{output}: {kind}, {size_text(size)}")
