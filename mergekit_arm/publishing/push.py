"""Upload a statistics directory to the Hub: checked, with a card the Hub accepts, in one commit."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from mergekit_arm.errors import Failure, InputError, first_line
from mergekit_arm.statistics.card import statistics_card
from mergekit_arm.statistics.format import METADATA_FILE
from mergekit_arm.statistics.locate import TENSOR_FILE
from mergekit_arm.statistics.read import Statistics

CARD = "README.md"
_OWN = (".gitattributes",)
"""Files that the Hub puts into every new repository."""


@dataclass(frozen=True)
class Upload:
    """What will be a commit on the Hub."""

    repository: str
    files: dict[str, Path]
    """Name on the Hub → file here; the card is not among them."""
    card: str
    """Text of ``README.md``."""

    @property
    def size(self) -> int:
        """Bytes of it all."""
        return len(self.card.encode()) + sum(one.stat().st_size for one in self.files.values())


def prepare_upload(directory: str | Path, repository: str, licence: str | None = None) -> Upload:
    """Check a statistics directory, every value of it, and make what would be uploaded.

    Its card is made anew with the repository's name in its YAML, unless somebody has edited it.

    Args:
        directory: what ``calibrate`` or ``combine`` wrote.
        repository: ``org/name`` on the Hub.
        licence: the Hub's name of one, such as ``apache-2.0``, for the card.

    Raises:
        InputError: no statistics directory, a damaged one, or no name of a repository.
    """
    try:
        huggingface_hub.utils.validate_repo_id(repository)  # type: ignore[attr-defined]
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no name on the Hub: write org/name") from error
    if repository.count("/") != 1:
        raise InputError(f"{repository!r} is no name on the Hub: write org/name")
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(
            f"{directory}: no such directory; name what `mergekit-arm calibrate` wrote"
        )
    statistics = Statistics(str(directory), directory)
    for name in statistics.names:
        statistics.stored(name)  # which compares it with its digest
    files = {file.name: file for file in sorted(directory.iterdir()) if _belongs(file)}
    written = directory / CARD
    edited = written.is_file() and _edited(written.read_text(encoding="utf-8"), statistics)
    if edited and licence is not None:
        raise InputError(f"{written} was edited: write the licence into it yourself")
    card = statistics_card(statistics.metadata, repository, licence)
    if edited:
        card = written.read_text(encoding="utf-8")
    return Upload(repository, files, card)


def push(upload: Upload, *, private: bool = False, force: bool = False) -> str:
    """Upload in one commit, so that nothing half-written is ever seen; return the page's address.

    Args:
        upload: what ``prepare_upload`` made.
        private: make the repository private, if it is new.
        force: replace files of a repository that has some.

    Raises:
        InputError: offline, not logged in, not allowed, files that would be replaced, or a card
            that the Hub refuses.
        Failure: the Hub did not answer, or failed.
    """
    api = HfApi()
    name = upload.repository
    try:
        _validate(upload.card)
        if huggingface_hub.get_token() is None:
            raise LocalTokenNotFoundError
        there = _files_of(api, name)
        if there and not force:
            raise InputError(
                f"{name} exists and holds {', '.join(there[:3])}{', …' if there[3:] else ''}; add "
                "--force to replace statistics and what has the same name, or choose another name"
            )
        address = api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            card = Path(folder) / CARD
            card.write_text(upload.card, encoding="utf-8")
            files = {CARD: card, **upload.files}
            # An index that stays, or a part that no index names any more, would be read.
            old = [one for one in there if _belongs(Path(one)) and one not in files]
            api.create_commit(
                name,
                [
                    *(CommitOperationAdd(one, str(file)) for one, file in files.items()),
                    *(CommitOperationDelete(one) for one in old),
                ],
                commit_message="Upload activation statistics",
            )
    except OfflineModeIsEnabled as error:
        raise InputError("HF_HUB_OFFLINE is set: unset it to publish") from error
    except LocalTokenNotFoundError as error:
        raise InputError("nobody is logged in: run `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise InputError(
                f"{name}: the Hub refuses it ({status}): use a token that may write there"
            ) from error
        raise Failure(f"{name}: {first_line(error)}; run it again") from error
    except InputError:
        raise
    except Exception as error:  # without a network the client raises from three libraries
        raise Failure(f"{name}: the Hub was not reached ({first_line(error)})") from error
    return str(address)


def _validate(card: str) -> None:
    """Let the Hub look at a card's metadata, before there is a repository."""
    try:
        ModelCard(card).validate(repo_type="model")
    except ValueError as error:
        raise InputError(f"the Hub refuses the card: {first_line(error)}") from error


def _files_of(api: HfApi, name: str) -> list[str]:
    """Return what a repository holds; nothing where it is not there yet."""
    try:
        return [one for one in api.list_repo_files(name) if one not in _OWN]
    except RepositoryNotFoundError:
        return []


def _edited(card: str, statistics: Statistics) -> bool:
    """Say whether a card is not as it was made, under whichever name the directory had then."""
    name = re.search(r"^# (.+)$", card, re.MULTILINE)
    return name is None or card != statistics_card(statistics.metadata, name[1])


def _belongs(file: Path) -> bool:
    index = f"{TENSOR_FILE}.index.json"
    return file.name in (METADATA_FILE, index) or file.suffix == ".safetensors"
