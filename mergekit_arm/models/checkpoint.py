"""A found model's checkpoint: brought here from the Hub, and opened."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.models.loading import Source, unloadable
from mergekit_arm.models.tensors import CheckpointTensors, open_tensors

_FILES = ("model.safetensors", "pytorch_model.bin")


def fetch_checkpoint(source: Source) -> None:
    """Download the weights of a Hub model into its cache, as transformers would.

    Raises:
        InputError: it has none, or cannot be reached.
    """
    if Path(source.name).is_dir():
        return
    try:
        for name in _FILES:
            index = cached_file(
                source.name,
                f"{name}.index.json",
                revision=source.revision,
                _raise_exceptions_for_missing_entries=False,
            )
            if index:
                get_checkpoint_shard_files(source.name, index, revision=source.revision)
                return
            if cached_file(
                source.name,
                name,
                revision=source.revision,
                _raise_exceptions_for_missing_entries=False,
            ):
                return
    except OSError as error:
        raise InputError(f"model {source.reference}: {first_line(error)}") from error
    raise InputError(f"model {source.reference} has neither {' nor '.join(_FILES)}")


def open_checkpoint(source: Source) -> CheckpointTensors:
    """Open the model's checkpoint, in the files that mergekit would read.

    Raises:
        InputError: no checkpoint file that mergekit can read.
    """
    folder = source.name
    if not Path(folder).is_dir():
        # transformers has fetched the weights already; mergekit's own download would list
        # the repository first, which fails offline even where everything is cached.
        try:
            folder = huggingface_hub.snapshot_download(
                folder, revision=source.commit or source.revision, local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise InputError(unloadable(source.reference, error)) from error
    return open_tensors(source.reference, Path(folder))
