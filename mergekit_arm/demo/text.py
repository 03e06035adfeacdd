"""Three kinds of text that every CPython brings along, each split into training and held-out parts.

``general``: the standard library's top-level modules as they are, code with its comments and
documentation. ``prose``: the language reference behind ``help()``. ``code``: modules of some
packages with comments and docstrings removed, so that nothing but code is left.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

from mergekit_arm.errors import Failure

DOMAINS = ("general", "prose", "code")

CODE_PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "html",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
# Below this the sources were stripped from the installation and no run would mean anything.
MIN_CHARACTERS = 100_000
# So that the held-out part is many files rather than one or two large ones.
MAX_FILE_BYTES = 50_000


@dataclass(frozen=True)
class DomainText:
    """Documents of one domain; no paragraph of ``heldout`` occurs in any domain's ``train``."""

    train: list[str]
    heldout: list[str]


def paragraphs(document: str) -> list[str]:
    """Return what blank lines separate in ``document``, without surrounding white space."""
    lines = "\n".join(line.rstrip() for line in document.splitlines())
    return [part.strip("\n") for part in lines.split("\n\n") if part.strip()]


def half(document: str, number: int) -> str:
    """Return the first (0) or second (1) half of a document's paragraphs."""
    parts = paragraphs(document)
    middle = len(parts) // 2
    return "\n\n".join(parts[middle:] if number else parts[:middle])


def standard_library(
    *, seed: int = 42, characters: int = 1_000_000, heldout: float = 0.1
) -> dict[str, DomainText]:
    """Read the three domains of this Python's standard library.

    ``characters`` bounds each domain; ``heldout`` is the share of it kept from training. The same
    Python and seed give the same text. Raises ``Failure`` where the sources are not installed.
    """
    generator = random.Random(seed)
    splits: dict[str, tuple[list[str], list[str]]] = {}
    for domain in DOMAINS:
        documents = list(_take(_documents(domain, generator), characters))
        size = sum(map(len, documents))
        if size < MIN_CHARACTERS:
            raise Failure(
                f"only {size} characters of {domain} text found in {_library()}: this Python comes "
                "without its sources; use one from python.org, conda or a full system package"
            )
        kept = list(_take(documents, int(heldout * size)))
        splits[domain] = documents[len(kept) :], kept

    # Licence headers recur between files, and whole sections between topics: documents that are
    # apart are not yet text that is apart.
    seen = {p for train, _ in splits.values() for document in train for p in paragraphs(document)}
    return {
        domain: DomainText(
            train, [fresh for document in kept if (fresh := _without(document, seen))]
        )
        for domain, (train, kept) in splits.items()
    }


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _documents(domain: str, generator: random.Random) -> Iterator[str]:
    if domain == "prose":
        names = sorted(topics.topics)
        generator.shuffle(names)
        yield from (topics.topics[name] for name in names)
        return
    if domain == "general":
        # _sysconfigdata is one generated dictionary that differs from build to build.
        files = [f for f in _library().glob("*.py") if not f.name.startswith("_sysconfigdata")]
    else:
        files = [f for package in CODE_PACKAGES for f in (_library() / package).rglob("*.py")]
    files = sorted(file for file in files if file.stat().st_size <= MAX_FILE_BYTES)
    generator.shuffle(files)
    for file in files:
        with tokenize.open(file) as source:
            text = source.read()
        yield _bare_code(text) if domain == "code" else text


def _bare_code(source: str) -> str:
    """Return ``source`` without comments (the parser drops them) and without docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
            and isinstance(body[0].value.value, str)
        ):
            body[0] = ast.Pass()
    return ast.unparse(tree)


def _take(documents: Iterable[str], characters: int) -> Iterator[str]:
    taken = 0
    for document in documents:
        if taken >= characters:
            return
        taken += len(document)
        yield document


def _without(document: str, seen: set[str]) -> str:
    return "\n\n".join(p for p in paragraphs(document) if p not in seen)
