"""Errors that a user can act on.

Both derive from ``click.ClickException`` and from nothing that pydantic would wrap
(``ValueError``, ``AssertionError``): raised while mergekit plans or executes a merge,
they end its commands with one line, the exit status below, and no traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import click


class _OneLine(click.ClickException):
    """An error whose message stays one line, whatever a damaged file has put into it."""

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


class InputError(_OneLine):
    """The user's input cannot work: exit status 2. The message names what, where and the remedy."""

    exit_code = 2


class Failure(_OneLine):
    """The input was fine but the work could not be finished: exit status 1."""

    exit_code = 1


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of ``known``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_choice(key: str, value: object, known: Sequence[str]) -> None:
    """Refuse a value of ``key`` that is none of ``known``.

    Raises:
        InputError: with what it may be.
    """
    if value not in known:
        meant = did_you_mean(str(value), known)
        raise InputError(f"{key}: {value!r} is none of {', '.join(known)}{meant}")


def visible(text: str) -> str:
    """Return ``text`` with line breaks and control characters spelt out."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type: what fits into ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
