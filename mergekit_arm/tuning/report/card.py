"""The card of a search's best model."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mergekit_arm.judging.judge import Scores
from mergekit_arm.judging.sets import EvaluationSet, HeldOutSet
from mergekit_arm.merging.card import front_matter, numbers, table
from mergekit_arm.tuning.plan import TunePlan
from mergekit_arm.tuning.trials import TrialRecord

Row = tuple[str, float | None, Scores]
"""What was scored, its gain, and its scores."""

_TEMPLATE = """---
{front}---
# The best merge of {count} trials

Trial {number}, {described}.
Made with [mergekit](https://github.com/arcee-ai/mergekit) and mergekit-arm's `tune`, which
searches the numbers of a merge. 0 is the base model's gain, 1 that of the best input model.

## Evaluation, on which the numbers were searched

{evaluation}
{sets}{test}
## Configuration

```yaml
{best}```
"""


def tune_card(
    plan: TunePlan,
    best: TrialRecord,
    text: str,
    count: int,
    evaluation: list[Row],
    test: list[Row],
) -> str:
    """Return the card's Markdown. No date and no duration: the same search, the same bytes."""
    tested = ""
    if test:
        tested = f"\n## Test, on which nothing was searched\n\n{_table(test)}"
    return _TEMPLATE.format(
        front=front_matter([*([plan.base] if plan.base else []), *plan.inputs]),
        count=count,
        number=best.number,
        described=best.describe(),
        evaluation=_table(evaluation),
        sets=_sets(plan, plan.judge.sets),
        test=tested,
        best=text,
    )


def _table(rows: list[Row]) -> str:
    names = list(rows[0][2])
    lines = []
    for label, gain, scores in rows:
        shown = label if not os.path.isabs(label) else os.path.basename(label)
        lines.append([shown, "" if gain is None else f"{gain:+.3f}", *numbers(scores, names)])
    return table(["", "gain", *names], lines) + "\n"


def _sets(plan: TunePlan, sets: Mapping[str, EvaluationSet]) -> str:
    lines = []
    for name, one in sets.items():
        if isinstance(one, HeldOutSet):
            held = plan.judge.heldout(name)
            lines.append(
                f"- {name}: mean loss (nats) of {held.scored_tokens:,} tokens, weight "
                f"{one.weight:g}, SHA-256 {held.digest[:16]}"
            )
        else:
            lines.append(f"- {name}: a command's number, {one.goal}d, weight {one.weight:g}")
    return "\n" + "\n".join(lines) + "\n"
