"""What a merged model says of the statistics that it was merged with.

mergekit writes ``mergekit_config.yml`` and a card, which name a directory of statistics by a path
that means nothing to others. So ``run_merge`` is followed by this: ``activation_stats.json`` beside
the configuration, and a section in the card, say which model the statistics are of, on what text
they were measured, and the digests by which they are recognised.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from mergekit import merge
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mergekit_arm import __version__
from mergekit_arm.files import write_text
from mergekit_arm.methods.base import STATS
from mergekit_arm.methods.levels import levels
from mergekit_arm.statistics.format import METADATA_FILE
from mergekit_arm.statistics.locate import is_provenance
from mergekit_arm.statistics.read import open_statistics

LOG = logging.getLogger(__name__)

PARAMETERS = (STATS, "task_stats")
"""Names of parameters whose values are statistics."""
HEADING = "## Activation statistics"
_NO_BASE = "---\nbase_model: []\n"
"""How mergekit's card begins where all models are local; the Hub takes no such list."""


def attach() -> None:
    """Let mergekit's ``run_merge`` leave the provenance; calling it again changes nothing."""
    if not getattr(merge.run_merge, "leaves_provenance", False):
        merge.run_merge = _leaving_provenance(merge.run_merge)


def provenance(config: MergeConfiguration) -> dict[str, Any]:
    """Return what ``activation_stats.json`` says: the statistics that a configuration names.

    Raises:
        InputError: some cannot be opened.
    """
    return {
        "mergekit_arm": __version__,
        "merge_method": config.merge_method,
        "statistics": [_described(reference) for reference in dict.fromkeys(named(config))],
    }


def named(config: MergeConfiguration) -> Iterator[str]:
    """Yield the statistics that a configuration names, in the order of its places."""
    for level in levels(config):
        for parameter in PARAMETERS:
            yield from _words(level.settings.get(parameter))


def section(document: dict[str, Any]) -> str:
    """Return the section of a card that says what ``provenance`` does."""
    rows = []
    for one in document["statistics"]:
        model, data = one["model"], one["data"]
        revision = f" at `{model['revision'][:12]}`" if "revision" in model else ""
        rows.append(
            f"| `{one['reference']}` | `{model['reference']}`{revision}, content "
            f"`{model['content_hash'][:16]}` | `{data['dataset']}`, {data['tokens']:,} tokens, "
            f"content `{data['content_hash'][:16]}` | `{str(one.get('digest'))[:16]}` |"
        )
    return "\n".join(
        [
            HEADING,
            "",
            (
                "The merge read these statistics of activations, which mergekit-arm measured. "
                f"`{METADATA_FILE}` has all that is known of them. With statistics of these "
                "digests and `mergekit_config.yml` the merge can be repeated."
            ),
            "",
            "| named as | of the model | measured on | digest |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )


def _leaving_provenance(run_merge: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(run_merge)
    def run(
        merge_config: MergeConfiguration,
        out_path: str,
        options: MergeOptions,
        *rest: Any,
        **more: Any,
    ) -> None:
        document = None
        if options.write_model_card and any(named(merge_config)):
            # Before the merge: mergekit rewrites the configuration that it is given.
            document = _described_or_warned(merge_config)
        run_merge(merge_config, out_path, options, *rest, **more)
        if document is not None:
            _leave(Path(out_path), document)
        else:
            _remove_stale(Path(out_path))

    run.leaves_provenance = True  # type: ignore[attr-defined]  # tells that it is ours
    return run


def _described_or_warned(config: MergeConfiguration) -> dict[str, Any] | None:
    try:
        return provenance(config)
    except click.ClickException as error:
        # A method that reads them says so while it plans; to another they are nothing.
        LOG.debug("no provenance: %s", error.message)
        return None


def _leave(out: Path, document: dict[str, Any]) -> None:
    """Write beside the merged model, whose merge is not to fail for it."""
    try:
        write_text(out / METADATA_FILE, json.dumps(document, indent=1, sort_keys=True) + "\n")
        card = out / "README.md"
        if card.is_file():
            text = card.read_text(encoding="utf-8").rstrip()
            if text.startswith(_NO_BASE):
                text = f"---\n{text.removeprefix(_NO_BASE)}"
            write_text(card, f"{text}\n\n{section(document)}")
    except OSError as error:
        LOG.warning("%s: what statistics it was merged with could not be written: %s", out, error)


def _remove_stale(out: Path) -> None:
    """Remove what an earlier merge into ``out`` was made with, which this one was not."""
    file = out / METADATA_FILE
    with contextlib.suppress(OSError, ValueError):
        if is_provenance(json.loads(file.read_text(encoding="utf-8"))):
            file.unlink()


def _described(reference: str) -> dict[str, Any]:
    """Return what is known of a directory, without the lists of its inputs and weights."""
    metadata = open_statistics(reference).metadata
    facts = metadata.model_dump(
        mode="json",
        include={"format_version", "digest", "model", "data", "settings", "versions"},
        exclude_none=True,
    )
    return {"reference": reference, **facts}


def _words(setting: Any) -> Iterator[str]:
    """Yield the words of a setting: one, a gradient's, or those of filters."""
    for one in setting if isinstance(setting, list) else [setting]:
        value = getattr(one, "value", one)
        yield from (word for word in (value if isinstance(value, list) else [value])
                    if isinstance(word, str))  # fmt: skip
