"""General text that every Python brings along, from two sources: one to measure, one to judge.

``calibration``: Python's language reference, as ``help()`` shows it, and its licence. Judging:
docstrings of the standard library. Both are English prose about the same matter, by different
hands; no paragraph is in both. Two others to measure show what that choice decides: docstrings that
are not judged, and code.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from pydoc_data import topics

from transformers import PreTrainedTokenizerBase

from mergekit_arm.demo.text import paragraphs
from tests.evidence.sizes import Size

SHORTEST = 300
"""Characters of a docstring that is text and not a label."""


@cache
def calibration_text() -> tuple[str, ...]:
    """Return what statistics are measured on."""
    texts = [topics.topics[name] for name in sorted(topics.topics)]
    random.Random(1).shuffle(texts)
    return tuple(texts)


@cache
def judging_text() -> tuple[str, ...]:
    """Return what forgetting is judged by: another source, without the first one's paragraphs."""
    known = {part for text in calibration_text() for part in paragraphs(text)}
    texts = []
    for docstring in _docstrings():
        fresh = "\n\n".join(part for part in paragraphs(docstring) if part not in known)
        if len(fresh) >= SHORTEST:
            texts.append(fresh)
    random.Random(2).shuffle(texts)
    return tuple(texts)


def docstrings_to_measure() -> tuple[str, ...]:
    """Return the source that is judged, from its other end."""
    return judging_text()[::-1]


@cache
def code_text() -> tuple[str, ...]:
    """Return functions of the standard library that have no docstring."""
    texts = [
        ast.unparse(node)
        for node in _nodes()
        if isinstance(node, ast.FunctionDef) and not ast.get_docstring(node)
    ]
    texts = [text for text in texts if len(text) >= SHORTEST]
    random.Random(3).shuffle(texts)
    return tuple(texts)


TEXTS: dict[str, Callable[[], tuple[str, ...]]] = {
    "general": calibration_text,
    "docstrings": docstrings_to_measure,
    "code": code_text,
}
"""What the base can be measured on."""


def judging_blocks(tokenizer: PreTrainedTokenizerBase, size: Size) -> list[list[int]]:
    """Return blocks of token ids; settings are chosen without them."""
    wanted = size.general["test"]
    ids: list[int] = []
    for text in judging_text():
        if len(ids) >= size.block * wanted:
            break
        ids += tokenizer(text + "\n\n", add_special_tokens=False)["input_ids"]
    return [ids[number * size.block : (number + 1) * size.block] for number in range(wanted)]


def digest(parts: object) -> str:
    """Return a short name of data, by which two machines can tell whether they judged the same."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _docstrings() -> Iterator[str]:
    for node in _nodes():
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield text


def _nodes() -> Iterator[ast.AST]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with tokenize.open(path) as file:
            yield from ast.walk(ast.parse(file.read()))
