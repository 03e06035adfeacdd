"""What a check says: one sentence each, with its place."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mergekit_arm.checking.document import Document, Place, dotted

Severity = Literal["error", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that a check has found."""

    severity: Severity
    """``error``: the merge fails, or ignores what is written. ``note``: good to know."""
    file: str
    line: int
    thing: str
    """The place in the configuration, such as ``models[0].parameters.weight``; may be empty."""
    message: str
    """What is wrong, and the remedy."""

    def __str__(self) -> str:
        thing = f"{self.thing}: " if self.thing else ""
        return f"{self.file}:{self.line}: {self.severity}: {thing}{self.message}"

    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


class Findings:
    """Collects what is found in one document."""

    def __init__(self, document: Document) -> None:
        """Start with nothing found."""
        self.document = document
        self.all: list[Finding] = []

    @property
    def errors(self) -> list[Finding]:
        """Everything because of which the configuration is refused."""
        return [one for one in self.all if one.severity == "error"]

    def error(self, place: Place, message: str) -> None:
        """Add what makes the merge fail, or what it ignores."""
        self._add("error", place, message)

    def note(self, place: Place, message: str) -> None:
        """Add what is good to know."""
        self._add("note", place, message)

    def add(self, others: Iterable[Finding]) -> None:
        """Add findings of the same file."""
        self.all += [one for one in others if one not in self.all]

    def known(self, message: str) -> bool:
        """Say whether an error says this already."""
        text = " ".join(message.split())
        return any(text in one.message or one.message in text for one in self.errors)

    def _add(self, severity: Severity, place: Place, message: str) -> None:
        document = self.document
        found = Finding(
            severity,
            document.file,
            document.line(place),
            dotted(place),
            " ".join(message.split()),
        )
        if found not in self.all:
            self.all.append(found)


class Repeated:
    """Errors of many tensors, of which those that are alike but for the name are said once."""

    def __init__(self) -> None:
        """Start with none."""
        self._messages: dict[str, list[str]] = defaultdict(list)

    def add(self, message: str, names: Iterable[str]) -> None:
        """Add what is wrong with a tensor that has these ``names``."""
        alike = message
        for name in sorted(names, key=len, reverse=True):
            alike = alike.replace(name, "")
        self._messages[re.sub(r"\d+", "#", alike)].append(message)

    def report(self, findings: Findings) -> None:
        """Say the first of each kind, and how many more there are."""
        for messages in self._messages.values():
            if not findings.known(messages[0]):
                more = f" (and so {len(messages) - 1} more tensors)" if messages[1:] else ""
                findings.error(blamed(findings.document, messages[0]), messages[0] + more)


def blamed(document: Document, message: str) -> Place:
    """Return the place that a message without one is about: a value in it, or a parameter."""
    leaves = list(document.leaves())
    for place, value in leaves:
        if isinstance(value, str) and len(value) > 2 and "parameters" in place and value in message:
            return place
    for place, _ in leaves:
        name = next((one for one in reversed(place) if isinstance(one, str)), "")
        inside = "parameters" in place and name not in ("value", "filter")
        if inside and re.search(rf"\b{re.escape(name)}\b", message):
            return place
    for place, value in leaves:
        named = place[-1] in ("model", "base_model")
        if named and re.search(rf"(?<![\w./-]){re.escape(str(value))}(?![\w/-])", message):
            return place
    return ("merge_method",)
