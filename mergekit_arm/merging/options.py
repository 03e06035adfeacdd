"""mergekit's own options, as every merge into a directory of ours needs them."""

from __future__ import annotations

from pathlib import Path

from mergekit.options import MergeOptions

LORA_CACHE = ".adapters"
"""In that directory: adapters merged into their models, where the user names no other place."""

_DECISIVE = ("random_seed", "lora_merge_dtype", "allow_crimes", "unsafe_truncate_embeddings")


def complete_options(options: MergeOptions, out: Path) -> MergeOptions:
    """Return ``options`` with what merges into ``out`` need."""
    return options.model_copy(
        update={
            "lora_merge_cache": options.lora_merge_cache or str(out / LORA_CACHE),
            "write_model_card": False,  # of those that have their configuration beside them
            "quiet": options.quiet or options.verbosity == 0,
        }
    )


def decisive_options(options: MergeOptions) -> dict[str, str]:
    """Return, by their flags, the options set that change what a merge is and not how fast."""
    return {
        f"--{name.replace('_', '-')}": str(getattr(options, name))
        for name in _DECISIVE
        if getattr(options, name) != MergeOptions.model_fields[name].default
    }
