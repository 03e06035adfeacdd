"""``python -m tests.evidence.score MODEL``: mean loss over validation splits, for ``tune``."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import click

from tests.evidence.bases import load
from tests.evidence.judging import judge_answers
from tests.evidence.runs import Base, Run
from tests.evidence.sizes import SIZES


@click.command()
@click.argument("model", type=click.Path(path_type=Path, exists=True))
@click.option("--size", type=click.Choice(list(SIZES)), required=True)
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--seed", type=int, required=True)
@click.option("--task", "tasks", multiple=True, required=True)
def main(model: Path, size: str, work: Path, seed: int, tasks: tuple[str, ...]) -> None:
    """Print the mean over all examples of an answer's nats per token."""
    base = Base(SIZES[size], work)
    loaded = load(model, base.size.device)
    losses = []
    for task in tasks:
        losses += judge_answers(loaded, Run(base, task, seed).encoded["validation"]).losses
    click.echo(fmean(losses))


if __name__ == "__main__":
    main()
