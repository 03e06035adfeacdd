"""The card of a stream's final model: what a stranger needs to judge it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import yaml

from mergekit_arm.judging.judge import Scores
from mergekit_arm.merging.card import front_matter, name_of, numbers, table, without_paths
from mergekit_arm.streaming.plan.plan import StreamPlan
from mergekit_arm.streaming.rates import rate_text
from mergekit_arm.streaming.state import State
from mergekit_arm.streaming.verdict import Evaluation

_TEMPLATE = """---
{front}---
# A stream of {count} merges

{origin}.
Made with [mergekit](https://github.com/arcee-ai/mergekit) and mergekit-arm's `stream`, which
merges the checkpoints of a training run one after another, each merge a step. The running model
is kept in float32 and cast once, at the end.
{comparison}
## Steps

{steps}
{statistics}

## Configuration

```yaml
{config}```

Directories are given by their last part. Made with {versions}.
"""

STEPS = ("step", "checkpoint", "learning rate", "‖update‖")
_PACKAGES = ("mergekit-arm", "mergekit", "torch", "transformers", "safetensors")


def stream_card(
    plan: StreamPlan, state: State, chosen: int, measured: Mapping[str, Any] | None = None
) -> str:
    """Return the card's Markdown: the model beside its likes, all steps, the YAML, versions.

    ``measured``: what a step's statistics say of their data, where it read any.

    No date, no duration and no path of this machine, so that the same stream gives the same
    bytes wherever it was made.
    """
    origin = "The base model, which no step bettered"
    if chosen:
        origin = f"Step {chosen} of {len(state.steps)}"
    return _TEMPLATE.format(
        front=front_matter([plan.config.base_model]),
        count=len(state.steps),
        origin=origin,
        comparison="\n".join(_comparison(plan.config.evaluation, state, chosen)),
        statistics="\n".join(_measured(measured)),
        steps="\n".join(_steps(state, chosen)),
        config=yaml.safe_dump(without_paths(plan.config.document()), sort_keys=False,
                              allow_unicode=True),
        versions=", ".join(f"{name} {version(name)}" for name in _PACKAGES),
    )  # fmt: skip


def _comparison(evaluation: Evaluation | None, state: State, chosen: int) -> Iterator[str]:
    """Yield the model beside the base, the checkpoints as they are, and their average."""
    if evaluation is None or not state.base:
        return
    scored = [one for record in state.steps for one in record.merged if one.scores]
    entries: list[tuple[str, Scores]] = [("base", state.base)]
    if scored:
        best = scored[0]
        for one in scored:
            if evaluation.better_of(one.scores, best.scores):
                best = one
        every = sum(len(record.merged) for record in state.steps)
        among = "" if len(scored) == every else f" of the {len(scored)} that were scored"
        entries.append((f"best single checkpoint{among} ({name_of(best.name)})", best.scores))
        entries.append((f"last checkpoint ({name_of(scored[-1].name)})", scored[-1].scores))
    average = state.average
    if average is not None and not average.missing:
        entries.append(("uniform average of the checkpoints", average.scores))
    entries.append(("**this model**", state.scores_of(chosen)))
    rows = [[name, *numbers(scores, state.base)] for name, scores in entries]
    yield f"\n## Beside others\n\n{table(['model', *state.base], rows)}\n"
    if average is not None and average.missing:
        yield f"The uniform average of the checkpoints is not scored: {average.missing}.\n"
    for name, judged in evaluation.sets.items():
        data = state.data.get(name)
        if data is None:
            yield f"- {name}: a command's number, to {judged.goal}"
        else:
            bound = judged.at_most
            kept = "" if bound is None else f"; a step may raise it by {bound:g}"
            source = name_of(str(getattr(judged, "dataset", "")))
            yield (
                f"- {name}: loss in nats per token over {data['tokens']:,} tokens of `{source}` "
                f"(SHA-256 of the token ids {data['sha256'][:16]}){kept}"
            )
    yield ""


def _measured(measured: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield on which text the statistics were measured that the steps read."""
    for facts in (measured or {}, (measured or {}).get("task", {})):
        data = facts.get("data")
        if data is not None:
            yield (
                f"\nActivations were measured over {data['tokens']:,} tokens of "
                f"`{name_of(data['dataset'])}` (SHA-256 of the token ids "
                f"{data['content_hash'][:16]})."
            )


def step_rows(state: State) -> Iterator[list[str]]:
    """Yield the base and every step as rows below :data:`STEPS` and the names of the sets."""
    names = list(state.base or {})
    if names:
        yield ["0", "base", "", "", *numbers(state.scores_of(0), names)]
    for record in state.steps:
        yield [
            str(record.step),
            record.checkpoint,
            rate_text(record.learning_rate) if record.accepted else "not merged",
            "" if record.update_norm is None else f"{record.update_norm:.4g}",
            *numbers(record.current, names),
        ]


def _steps(state: State, chosen: int) -> Iterator[str]:
    """Yield the table of all steps, and what was skipped."""
    yield table(
        [*STEPS, *(state.base or {})],
        [
            [f"**{step}**" if step == str(chosen) else step, name_of(name), *rest]
            for step, name, *rest in step_rows(state)
        ],
    )
    if state.skipped:
        yield "\nCheckpoints that could not be merged:\n"
    for one in state.skipped:
        yield f"- {name_of(one.checkpoint)}: {without_paths(one.reason)}"
