"""``python -m tests.benchmarks [NAMES…] [--out FILE.json] [--quick]``."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.console import Console

from tests.benchmarks.catalogue import BENCHMARKS, ON_REQUEST
from tests.benchmarks.harness import Row, launch
from tests.benchmarks.inputs import Workshop
from tests.benchmarks.report import machine, results_table, write_json


@click.command(epilog="Names: " + ", ".join(BENCHMARKS))
@click.argument("names", nargs=-1, type=click.Choice(list(BENCHMARKS)), metavar="[NAMES]…")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("benchmarks.json"),
    show_default=True,
    help="Every measurement, as JSON.",
)
@click.option("--quick", is_flag=True, help="Tiny inputs, one round: shows that it runs.")
@click.option("--rounds", type=click.IntRange(1), help="Times each is run.  [default: 5]")
@click.option("--force", is_flag=True, help="Replace results at --out.")
def main(names: tuple[str, ...], out: Path, quick: bool, rounds: int | None, force: bool) -> None:
    """Compare what this package does with what it is built on; all benchmarks without NAMES."""
    if out.exists() and not force:
        raise click.UsageError(f"{out} exists: choose another --out, or --force")
    console = Console()
    chosen = names or tuple(name for name in BENCHMARKS if name not in ON_REQUEST)
    rows: list[Row] = []
    failed: list[str] = []
    with TemporaryDirectory(prefix="mergekit-arm-benchmarks-") as folder:
        shop = Workshop(Path(folder), launch, quick, rounds or (1 if quick else 5))
        settings = {"quick": quick, "rounds": shop.rounds, "load": {}}
        for name in chosen:
            with console.status(name):
                # A busy machine shows in the results; the reader should know.
                settings["load"][name] = round(os.getloadavg()[0], 2)
                try:
                    rows += BENCHMARKS[name](shop)
                except RuntimeError as error:
                    # What the others measured, for an hour perhaps, is not lost with this one.
                    failed.append(name)
                    console.print(f"{name}: {error}", style="red", markup=False)
            write_json(out, rows, settings)
    console.print(results_table(rows, machine()))
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
