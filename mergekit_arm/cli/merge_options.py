"""mergekit's own merge options, as ``stream`` and ``tune`` offer them.

mergekit declares them in a module that imports torch, so that asking for help would take seconds.
Hence this copy; ``tests/cli/test_merge_options.py`` compares it with mergekit's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from mergekit_arm.errors import InputError

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

Function = TypeVar("Function", bound=Callable[..., Any])


def size(text: str | int) -> int:
    """Return a number of parameters, which mergekit reads as 500M or 5B; click shows SIZE."""
    if isinstance(text, int):
        return text
    from mergekit.common import parse_kmb  # not for --help: it imports torch

    try:
        return int(parse_kmb(text))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no number such as 500M or 5B") from error


_OUTPUT, _STORAGE = "Output Settings", "Storage"
_FAST, _DANGEROUS, _OTHER = "Performance", "Dangerous Options", "Miscellaneous"
_OWN = "Script Options"

OPTIONS: dict[str, tuple[str, Any, Any, str]] = {
    "allow_crimes": (_DANGEROUS, bool, False, "Allow mixing architectures"),
    "unsafe_truncate_embeddings": (
        _DANGEROUS,
        bool,
        False,
        (
            "UNSAFE: discard trailing embedding rows to match the smallest vocabulary. Assumes "
            "identical token IDs; use tokenizer configuration instead."
        ),
    ),
    "transformers_cache": (_STORAGE, str, None, "Override storage path for downloaded models"),
    "lora_merge_cache": (_STORAGE, str, None, "Path to store merged LORA models"),
    "lora_merge_dtype": (_OTHER, str, None, "Override dtype when applying LoRAs"),
    "cuda": (_FAST, bool, False, "Perform matrix arithmetic on GPU"),
    "device": (_FAST, str, None, "Perform matrix arithmetic on specified device"),
    "low_cpu_memory": (
        _FAST,
        bool,
        False,
        "Store results and intermediate values on accelerator. Useful if VRAM > RAM",
    ),
    "out_shard_size": (
        _OUTPUT,
        size,
        5_000_000_000,
        "Number of parameters per output shard  [default: 5B]",
    ),
    "copy_tokenizer": (_OUTPUT, bool, True, "Copy a tokenizer to the output"),
    "clone_tensors": (
        _OUTPUT,
        bool,
        False,
        "Clone tensors before saving, to allow multiple occurrences of the same layer",
    ),
    "trust_remote_code": (
        _DANGEROUS,
        bool,
        False,
        "Trust remote code from huggingface repos (danger)",
    ),
    "random_seed": (_OTHER, int, None, "Seed for reproducible use of randomized merge methods"),
    "lazy_unpickle": (
        _FAST,
        bool,
        False,
        "Experimental lazy unpickler for lower memory usage",
    ),
    "write_model_card": (
        _OUTPUT,
        bool,
        True,
        "Output README.md containing details of the merge",
    ),
    "safe_serialization": (
        _OUTPUT,
        bool,
        True,
        "Save output in safetensors. Do this, don't poison the world with more pickled models.",
    ),
    "verbosity": (_OTHER, int, 0, "Verbose logging (repeat for more verbosity)"),
    "quiet": (_OTHER, bool, False, "Suppress progress bars and other non-essential output"),
    "read_to_gpu": (_FAST, bool, False, "Read model weights directly to accelerator"),
    "multi_gpu": (_FAST, bool, False, "Use multi-gpu parallel graph execution engine"),
    "num_threads": (_FAST, int, None, "Number of threads to use for parallel CPU operations"),
    "gpu_rich": (_FAST, bool, False, "Alias for --cuda --low-cpu-memory --read-to-gpu --multi-gpu"),
    "async_write": (
        _FAST,
        bool,
        False,
        "Write output shards asynchronously (faster execution, higher memory use)",
    ),
    "write_threads": (_FAST, int, 1, "Number of threads to use for asynchronous writes"),
}
"""Field of ``MergeOptions`` → heading in ``--help``, type, default and help."""

_FLAGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "verbosity": (("-v", "verbosity"), {"count": True}),
    "num_threads": (("--num-threads", "-j"), {}),
    "gpu_rich": (("--gpu-rich",), {"is_flag": True}),
}


def add_merge_options(function: Function) -> Function:
    """Let a command take mergekit's options; :func:`merge_options` makes them of its values."""
    for name, (_, kind, default, text) in reversed(OPTIONS.items()):
        flag = name.replace("_", "-")
        usual = (f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}",)
        flags, more = _FLAGS.get(name, (usual, {}))
        shown = name not in ("out_shard_size", "verbosity")
        option = click.option(
            *flags, type=kind, default=default, help=text, show_default=shown, **more
        )
        function = option(function)
    return function


def merge_options(values: dict[str, Any]) -> MergeOptions:
    """Take mergekit's options out of a command's ``values``.

    Raises:
        InputError: an option is given that the installed mergekit does not have.
    """
    from mergekit.options import MergeOptions  # not for --help: it imports torch

    taken = {name: values.pop(name) for name in OPTIONS}
    _refuse_unknown(taken, MergeOptions.model_fields)
    return MergeOptions(**taken)


def _refuse_unknown(taken: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    for name, value in taken.items():
        if name not in fields and value != OPTIONS[name][2]:
            raise InputError(f"the installed mergekit has no --{name.replace('_', '-')}: omit it")


class MergeCommand(click.Command):
    """A command whose help puts mergekit's options under mergekit's headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, our own first."""
        headings: dict[str, list[tuple[str, str]]] = {_OWN: []}
        for parameter in self.params:
            record = parameter.get_help_record(ctx)
            if record is not None:
                heading = OPTIONS.get(str(parameter.name), (_OWN,))[0]
                headings.setdefault(heading, []).append(record)
        for heading, records in headings.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
