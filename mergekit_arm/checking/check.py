"""Check a configuration file: which kind of configuration it is, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import click
from mergekit.options import MergeOptions

from mergekit_arm.checking.document import Document, Place, dotted, read_documents
from mergekit_arm.checking.findings import Finding, Findings
from mergekit_arm.checking.keys import NAME, check_duplicates
from mergekit_arm.checking.merge import check_merge
from mergekit_arm.errors import InputError
from mergekit_arm.merging.room import Room
from mergekit_arm.streaming.forecast import forecast_stream
from mergekit_arm.streaming.options import StreamOptions, WatchOptions
from mergekit_arm.tuning.candidates import document_of
from mergekit_arm.tuning.options import TuneOptions
from mergekit_arm.tuning.plan import TunePlan
from mergekit_arm.tuning.tune import plan_tuning

_NEW = ".mergekit-arm-check"
"""A directory that is not there, in the place of one that has not been named."""

_CHECKS: Mapping[str, Callable[[Findings, MergeOptions, Path], Room | None]]


@dataclass(frozen=True)
class Checked:
    """What ``check`` has found."""

    findings: list[Finding]
    rooms: list[Room]
    """Of every document that could be planned."""

    @property
    def accepted(self) -> bool:
        """Whether nothing makes the work fail, and nothing that is written is ignored."""
        return all(one.severity != "error" for one in self.findings)


def check(
    path: str | Path, options: MergeOptions | None = None, out: str | Path | None = None
) -> Checked:
    """Find what is wrong with the configuration at ``path``, from headers and never from weights.

    Args:
        path: of a merge, of several (``mergekit-multi``), or of a stream.
        options: those that will be given to mergekit.
        out: the directory where the result will lie, there or not; None: a new one, here.

    Raises:
        InputError: the file cannot be read, or ``out`` cannot be written.
    """
    options = options or MergeOptions()
    documents = read_documents(path)
    if not documents:
        raise InputError(f"{path}: it is empty; write merge_method, models and base_model")
    names = {one.value.get(NAME) for one in documents if isinstance(one.value, dict)}
    made = frozenset(str(name) for name in names if name is not None)
    place = None if out is None else Path(out)
    found, rooms = list[Finding](), list[Room]()
    circle = _circle(documents, made)
    for document in documents:
        findings = Findings(document)
        check_duplicates(document, findings)
        _check_names(document, findings, made, circle)
        room = _check_document(document, findings, options, place, made)
        if room is not None:
            rooms.append(room)
        found += sorted(findings.all, key=lambda one: one.line)
    if len(documents) > 1 and len(names) < len(documents):
        raise InputError(f"{path}: give each of its {len(documents)} documents a name of its own")
    return Checked(found, rooms)


def _uses(document: Document, made: frozenset[str]) -> Iterator[tuple[Place, str]]:
    """Yield where a document's text is another's name, for which mergekit-multi puts a path."""
    for place, value in document.leaves():
        if value in made and place != (NAME,):
            yield place, str(value)


def _circle(documents: Sequence[Document], made: frozenset[str]) -> list[str]:
    """Return the names of documents that need each other; empty where there are none."""
    graph = {
        str(one.value[NAME]): {name for at, name in _uses(one, made) if at[-1] in _OF_MODELS}
        for one in documents
        if isinstance(one.value, dict) and NAME in one.value
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def _check_names(
    document: Document, findings: Findings, made: frozenset[str], circle: list[str]
) -> None:
    """Find documents that ``mergekit-multi`` cannot put in an order, or would spoil."""
    for place, name in _uses(document, made):
        if place[-1] not in _OF_MODELS:
            findings.error(
                place,
                f"{name} is the name of a document too, and mergekit-multi would put that model's "
                "path here: give the document another name",
            )
    if isinstance(document.value, dict) and str(document.value.get(NAME)) in circle:
        findings.error(
            (NAME,),
            f"needs what needs it ({' → '.join(circle)}): mergekit-multi finds no order for these",
        )


def _check_document(
    document: Document,
    findings: Findings,
    options: MergeOptions,
    out: Path | None,
    made: frozenset[str],
) -> Room | None:
    if not isinstance(document.value, dict) or not document.value:
        findings.error((), "must be a mapping that starts with merge_method, models, base_model …")
        return None
    for key, special in _CHECKS.items():
        if key in document.value:
            return special(findings, options, out or Path(_NEW))
    keys = document.value.keys()
    if keys & _OF_STREAMS and not keys & {"models", "slices", "modules"}:
        return _check_stream(findings, options, out or Path(_NEW))
    return check_merge(findings, options, out or Path(), made)


def _check_stream(findings: Findings, options: MergeOptions, out: Path) -> Room | None:
    """Check a stream as its own dry run does."""
    document = findings.document
    value, watch = document.value, None
    if "checkpoints" not in value:
        findings.error(
            (),
            "there are no checkpoints: name a run's directory, or list models; a StreamCallback, "
            "which takes them from its training, checks the rest itself",
        )
        value, watch = {**value, "checkpoints": "of a training to come"}, WatchOptions()
    try:
        report = forecast_stream(value, out, StreamOptions(options, watch=watch))
    except InputError as error:
        findings.error(_named(document, error.message), error.message)
        return None
    for problem in report.problems:
        place = _named(document, problem)
        findings.error(place, problem.removeprefix(f"{dotted(place)}: "))
    for note in report.plan.notes if report.plan else ():
        findings.note(_named(document, note), note)
    return report.needs


def _check_tuning(findings: Findings, options: MergeOptions, out: Path) -> Room | None:
    """Check a search as its own command does before the first merge."""
    document = findings.document
    try:
        plan, merge = plan_tuning(document.value, out, TuneOptions(options))
    except click.ClickException as error:
        message = error.message.removeprefix("configuration: ")
        findings.error(_named(document, message), message)
        return None
    for note in plan.notes:
        findings.note(_named(document, note), note)
    findings.add(check_trials(document, plan, merge))
    return None


def check_trials(document: Document, plan: TunePlan, options: MergeOptions) -> list[Finding]:
    """Return what is wrong with a search's first merge by each method.

    As a merge is checked in which nothing is unknown: an unknown that no tensor reads is found.
    """
    errors = list[Finding]()
    first = {method: (method, values) for method, values in reversed(plan.quest.first)}
    for point in first.values():
        filled = Findings(replace(document, value=document_of(plan.config.space, point)))
        check_merge(filled, options, None, frozenset())
        errors += [one for one in filled.errors if one not in errors]
    return errors


def _named(document: Document, message: str) -> Place:
    """Return the place that a message begins with, such as ``evaluation.samples:``.

    The key that nobody knows, or as much of the place as the document has; of a model, its name.
    """
    words = re.findall(r"[\w.\[\]]+(?=: )", message.removeprefix("configuration: "))[:3]
    if found := re.search(r"(?:unknown|knows no) key '(\w+)'(?: in ([\w.]+))?", message):
        words += [found[2] or "", found[1]]
    place: Place = ()
    for part in re.findall(r"\w+", ".".join(words)):
        inner = (*place, int(part) if part.isdecimal() else part)
        if inner in document.lines:
            place = inner
    if not place and (model := re.match(r"model (\S+): ", message)):
        return next((at for at, value in document.leaves() if value == model[1]), ())
    return place


_OF_MODELS = ("model", "base_model", "source", "tokenizer_source")
"""Keys under which a model may be named."""

_OF_STREAMS = {"evaluation", "learning_rate", "passes", "compare"}
"""Top-level keys by which a stream is recognised whose checkpoints a training will name."""

_CHECKS = {"checkpoints": _check_stream, "tuning": _check_tuning}
"""A top-level key that only one kind of configuration has → its check. Any other is a merge."""
