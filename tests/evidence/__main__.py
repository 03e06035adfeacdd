"""``python -m tests.evidence STUDY --size tiny|small|gpu``."""

from __future__ import annotations

import os
from fnmatch import fnmatch
from pathlib import Path

import click
from rich.console import Console

from tests.evidence import specialists, streams
from tests.evidence.runs import Base
from tests.evidence.sizes import SIZES
from tests.evidence.units import RESULTS, Store

STUDIES = {"streams": streams, "specialists": specialists}


def default_work() -> Path:
    """Return where checkpoints lie between two calls; all of it may be deleted."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "mergekit-arm-evidence"


@click.command()
@click.argument("study", type=click.Choice(list(STUDIES)))
@click.option("--size", "size_name", type=click.Choice(list(SIZES)), required=True)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=default_work,
    help="Where checkpoints are kept: 4 GB a run of size small. What is deleted is trained again "
    "where it is needed.  [default: the user's cache]",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=RESULTS,
    help="Where the lines are kept.  [default: the repository's]",
)
@click.option("--only", metavar="UNIT", help="Units whose name matches, such as '*/reverse/0/*'.")
@click.option("--core", is_flag=True, help="Only the stages that the study's question needs.")
@click.option(
    "--stage",
    "stages",
    multiple=True,
    type=click.Choice(list(dict.fromkeys((*streams.STAGES, *specialists.STAGES)))),
    help="Only this stage; may be given several times.",
)
@click.option("--dry-run", is_flag=True, help="List the units, and which are done.")
def main(
    study: str,
    size_name: str,
    work: Path,
    results: Path,
    only: str | None,
    core: bool,
    stages: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Do what is left of a study; every unit that is finished leaves a line."""
    console = Console(highlight=False, soft_wrap=True)
    store = Store(study, size_name, results)
    module = STUDIES[study]
    if strange := set(stages) - set(module.STAGES):
        raise click.UsageError(f"{study} has no stage {', '.join(sorted(strange))}")
    wanted = stages or (module.CORE if core else module.STAGES)
    units = module.units(Base(SIZES[size_name], work), store, wanted)
    if only:
        units = [unit for unit in units if fnmatch(str(unit.key), only)]
        if not units:
            raise click.UsageError(f"no unit is called {only}: see --dry-run")
    for number, unit in enumerate(units, 1):
        done = store.get(unit.key) is not None
        if dry_run:
            console.print(f"{'done' if done else 'open'}  {unit.key}", markup=False)
        elif not done:
            line = store.run(unit)
            console.print(
                f"{number} of {len(units)}  {unit.key}  {line['seconds']:.0f} s", markup=False
            )


if __name__ == "__main__":
    main()
