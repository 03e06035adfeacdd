"""The model card of a statistics directory."""

from __future__ import annotations

import re
from collections import Counter

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mergekit_arm.statistics.format import NOT_THERE, Metadata
from mergekit_arm.statistics.kinds import kinds

_TEMPLATE = """---
{front}---
# {name}

Activation statistics of `{reference}`{revision}, for merging with
[mergekit](https://github.com/arcee-ai/mergekit) and mergekit-arm's merge methods.
They hold sums over calibration tokens for every input channel, and no text.

| | |
| --- | --- |
| model | `{reference}` ({architecture}), content `{content}` |
| data | `{dataset}`{split}, column `{column}`, seed {seed} |
| measured | {sequences} sequences, {tokens:,} tokens |
| statistics | {statistics}, forward passes in {dtype} on {device} |
| licence | {licence} |
| coverage | {measured} weights measured at {sites} inputs{unmeasured} |
| made with | {versions} |

To merge with them:

```yaml
merge_method: aim_ties            # aim_ and any mergekit method
base_model: {reference_at}
models:
  - model: …
    parameters: {{weight: 1.0, density: 0.5}}
parameters:
  activation_stats: {name}   # this directory, or its name on the Hub
{parameters}```
"""


def statistics_card(metadata: Metadata, name: str, licence: str | None = None) -> str:
    """Return the card's Markdown: what it is, how it was measured, the YAML that uses it.

    ``name`` is the directory's, or the repository's on the Hub; ``licence`` the Hub's name of one.
    No date, so that the same measurement gives the same bytes.
    """
    model, data, settings = metadata.model, metadata.data, metadata.settings
    reasons = Counter(w.reason for w in metadata.weights.values() if w.reason)
    local = model.revision is None
    return _TEMPLATE.format(
        front=yaml.safe_dump(_front(metadata, licence), sort_keys=False),
        licence=f"`{licence}`" if licence else "not stated; the model's and the data's own apply",
        name=name,
        reference=model.reference,
        revision="" if local else f" at revision `{model.revision}`",
        reference_at=model.reference
        if local or "@" in model.reference or "+" in model.reference
        else f"{model.reference}@{model.revision}",
        architecture=model.architecture,
        content=model.content_hash[:16],
        dataset=data.dataset,
        split=f", split `{data.split}`" if data.split else "",
        column=data.column,
        seed="several" if data.seed is None else data.seed,
        sequences=data.sequences,
        tokens=data.tokens,
        statistics=" and ".join(settings.statistics),
        dtype=settings.dtype,
        device=settings.device,
        measured=sum(1 for w in metadata.weights.values() if w.site),
        sites=len(metadata.sites),
        unmeasured="".join(f", {count} {reason}" for reason, count in sorted(reasons.items())),
        parameters=_parameters(metadata),
        versions=", ".join(f"{package} {v}" for package, v in metadata.versions.items()),
    )


def _parameters(metadata: Metadata) -> str:
    """Return the lines with which a merge accepts the statistics, though some lack something."""
    needed = {k: v for one in kinds() for k, v in one.parameters(metadata.settings).items()}
    lines = "".join(f"  {name}: {value}\n" for name, value in needed.items())
    lacking = {
        name.removesuffix(".weight").rpartition(".")[2]
        for name, weight in metadata.weights.items()
        if weight.reason == NOT_THERE
    }
    # A filter is a part of a name: norm is enough for input_layernorm.
    parts = sorted(one for one in lacking if not any(o in one for o in lacking - {one}))
    filters = "".join(f"    - {{filter: {one}, value: 1.0}}   # not measured\n" for one in parts)
    omega = f"  omega:\n{filters}    - {{value: 0.4}}\n" if filters else "  omega: 0.4\n"
    return lines + omega


def _front(metadata: Metadata, licence: str | None) -> dict[str, object]:
    """Return the metadata that the Hub reads; it refuses names that no repository can have."""
    front: dict[str, object] = {
        "library_name": "mergekit-arm",
        "tags": ["mergekit", "activation-statistics"],
    }
    if licence:
        front["license"] = licence
    model = metadata.model.reference.split("@")[0].split("+")[0]
    if metadata.model.revision is not None and _is_hub_id(model):
        front["base_model"] = model
    data = [one.dataset for one in metadata.data.mixture or []] or [metadata.data.dataset]
    published = [one for one in dict.fromkeys(data) if _is_hub_id(one) and "/" in one]
    if published:
        front["datasets"] = published
    return front


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not re.search(r"\.(jsonl?|txt|csv|parquet)(\.\w+)?$", name)
