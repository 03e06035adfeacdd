"""Where a merge's inputs lie on this machine. Nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
from mergekit.common import ModelPath, ModelReference

from mergekit_arm.errors import InputError
from mergekit_arm.files import is_path
from mergekit_arm.models.contents import missing_part
from mergekit_arm.models.loading import find_model


@dataclass
class Stored:
    """The models of a merge."""

    folders: dict[ModelReference, Path] = field(default_factory=dict)
    """Those that are here."""
    gone: list[str] = field(default_factory=list)
    """Those that are not, or not all of them."""


@contextmanager
def stored_models(references: Iterable[ModelReference]) -> Iterator[Stored]:
    """Look for every model; one with an adapter is merged into a temporary directory.

    That is mergekit's own code on the same files, and takes as much disk as the model does.
    """
    with ExitStack() as stack:
        found = Stored()
        for reference in sorted(references, key=str):
            parts = [one for one in (reference.model, reference.lora) if one is not None]
            folders = [folder for one in parts if (folder := _folder(one)) is not None]
            if len(folders) < len(parts):
                found.gone.append(str(reference))
                continue
            if reference.lora is not None:
                whole = "+".join(map(str, folders))
                try:
                    folders = [Path(stack.enter_context(find_model(whole)).name)]
                except InputError as error:
                    found.gone.append(f"{reference} ({error.message})")
                    continue
            found.folders[reference] = folders[0]
        yield found


def _folder(part: ModelPath) -> Path | None:
    """Return where a model or adapter lies; None where it does not, or not all of it."""
    folder = part.path
    if not os.path.isdir(folder):
        if is_path(folder):
            return None
        try:
            folder = huggingface_hub.snapshot_download(
                folder, revision=part.revision, local_files_only=True
            )
        except (OSError, ValueError):
            return None
    return None if missing_part(Path(folder)) else Path(folder)
