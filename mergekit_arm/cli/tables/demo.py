"""What ``mergekit-arm demo`` prints at its end."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from mergekit_arm.demo.demo import LossTable
from mergekit_arm.demo.merges import BASE, CALIBRATION, SPECIALTIES, merged_models
from mergekit_arm.demo.stream import DOMAIN as STREAMED
from mergekit_arm.demo.stream import STREAM_CONFIG
from mergekit_arm.demo.text import DOMAINS


def loss_table(losses: LossTable) -> Table:
    """Return the held-out losses of every model."""
    table = Table(title="Held-out loss, nats per token (lower is better)")
    table.add_column("model")
    for domain in (*DOMAINS, "average"):
        table.add_column(domain, justify="right")
    for number, (name, row) in enumerate(losses.items()):
        values = [row[domain] for domain in DOMAINS]
        cells = [f"{value:.3f}" for value in (*values, sum(values) / len(values))]
        role = f"{name} specialist" if name in SPECIALTIES else name
        table.add_row(role, *cells, end_section=number == len(SPECIALTIES))
    return table


def closing(out: Path, losses: LossTable, seconds: float) -> str:
    """Return what the losses say, and how to repeat a part of the demo."""
    averages = {name: sum(losses[name].values()) / len(DOMAINS) for name in merged_models()}
    first, second = sorted(averages, key=averages.__getitem__)[:2]
    return f"""\
The merge with the lowest average is {first}, {averages[second] - averages[first]:.3f} below
{second}. One very small model shows that everything works, not which method is best.

Done in {seconds:.0f} s. To repeat a part of it, or to try other settings:

  cd {out}
  mergekit-arm calibrate {CALIBRATION.model} {CALIBRATION.out} --dataset {CALIBRATION.dataset} \\
    --samples {CALIBRATION.samples} --sequence-length {CALIBRATION.sequence_length} --force
  mergekit-yaml configs/aim_ties.yml merged/aim_ties
  mergekit-arm tune configs/tune_aim.yml tuned-again/aim
  mergekit-arm stream {STREAM_CONFIG} streamed-again

streamed/stream.png shows the stream: the {STREAMED} specialist's early checkpoints, merged one
after another.
There: the models {BASE}, {" and ".join(SPECIALTIES)}, statistics in stats*, calibration.jsonl,
configs, merged, tuned (each with best.yml and tune.png), runs, streamed, the training, validation
and heldout text, losses.json."""
