"""The card of a stream's final model."""

from __future__ import annotations

import os

import yaml

from mergekit_arm.streaming.config import StreamConfig
from mergekit_arm.streaming.judge import Score
from mergekit_arm.streaming.state import State

_TEMPLATE = """---
{front}---
# A stream of {count} merges

{origin}.
Made with [mergekit](https://github.com/arcee-ai/mergekit) and mergekit-arm's `stream`, which
merges the checkpoints of a training run one after another, each merge a step. The running model
is kept in float32 and cast once, at the end.

## Steps

{table}

## Configuration

```yaml
{config}```
"""


def stream_card(config: StreamConfig, state: State, chosen: int) -> str:
    """Return the card's Markdown: which step this is, all steps with their losses, the YAML.

    No date and no duration, so that the same stream gives the same bytes.
    """
    front: dict[str, object] = {"library_name": "transformers"}
    base = config.base_model.split("+")[0].split("@")[0]
    # The Hub refuses a card whose base_model is not a repository's name.
    if not os.path.isabs(base):
        front["base_model"] = [base]
    front["tags"] = ["mergekit", "merge", "mergekit-arm"]
    origin = (
        f"Step {chosen} of {len(state.steps)}"
        if chosen
        else "The base model, which no step bettered"
    )
    return _TEMPLATE.format(
        front=yaml.safe_dump(front, sort_keys=False),
        count=len(state.steps),
        origin=origin,
        table=_table(config, state, chosen),
        config=yaml.safe_dump(config.document(), sort_keys=False, allow_unicode=True),
    )


def _table(config: StreamConfig, state: State, chosen: int) -> str:
    evaluation = config.evaluation
    loss = evaluation is not None and evaluation.dataset is not None
    metric = evaluation is not None and evaluation.metric_command is not None
    header = ["step", "checkpoint", "learning rate", "‖update‖"]
    header += ["loss", "perplexity"] * loss + ["metric"] * metric
    rows = [header, ["---"] * len(header)]
    if evaluation is not None:
        base = state.base or Score()
        rows.append([_mark(0, chosen), "base", "", "", *_numbers(base, loss, metric)])
    for record in state.steps:
        rate = "" if record.learning_rate is None else f"{record.learning_rate:g}"
        rows.append(
            [
                _mark(record.step, chosen),
                record.checkpoint,
                rate if record.accepted else "not merged",
                f"{record.update_norm:.4g}",
                *_numbers(record.current, loss, metric),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _mark(step: int, chosen: int) -> str:
    return f"**{step}**" if step == chosen else str(step)


def _numbers(score: Score, loss: bool, metric: bool) -> list[str]:
    cells = []
    if loss:
        cells += [f"{score.loss:.4f}", f"{score.perplexity:.2f}"]
    if metric:
        cells.append(f"{score.metric:g}")
    return cells
