"""What a row is: a text, a chat or token ids, and in which columns it stands."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mergekit_arm.errors import InputError, did_you_mean

TOKEN_COLUMN, CHAT_COLUMN, TEXT_COLUMN = "input_ids", "messages", "text"
USUAL_COLUMNS = (TOKEN_COLUMN, CHAT_COLUMN, TEXT_COLUMN)
"""In the order in which they are chosen."""
_CHAT_COLUMNS = (CHAT_COLUMN, "conversations", "conversation", "chat", "dialog", "dialogue")
_QUESTIONS = ("prompt", "question", "query", "problem")
_ANSWERS = ("completion", "response", "answer", "solution", "output")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's names of those who speak, where templates have others."""

Row = Mapping[str, Any]
Chat = list[dict[str, Any]]


class Unusable(Exception):
    """A row that is left out; its text is the reason."""


@dataclass(frozen=True)
class RowFormat:
    """How rows are read."""

    kind: Literal["ids", "text", "chat"]
    columns: tuple[str, ...]
    title: str
    """What the rows are, for people."""
    read: Callable[[Row], Any]
    """Returns a row's text, or its chat.

    Raises:
        Unusable: there is none.
    """

    @property
    def column(self) -> str:
        """The columns' names, for records and messages."""
        return ", ".join(self.columns)

    def __str__(self) -> str:
        plural = "s" if len(self.columns) > 1 else ""
        return f"read as {self.title}, column{plural} {self.column}"


def find_format(first: Sequence[Row], names: Sequence[str], column: str | None) -> RowFormat:
    """Choose the columns, and what they hold, by what the ``first`` rows have in them.

    Without ``column`` the first that fits: token ids, messages, text, another column of chats, an
    instruction or question with its answer, the only column of strings.

    Raises:
        InputError: no such column, or none that can be chosen.
    """
    if column is not None:
        if column not in names:
            raise InputError(
                f"--text-column {column}: the data has {', '.join(names)}"
                f"{did_you_mean(column, names)}"
            )
        return _by_value(column, _first_value(first, column))
    for known in USUAL_COLUMNS:
        if known in names:
            return _by_value(known, _first_value(first, known))
    for known in _CHAT_COLUMNS:
        if known in names and _as_chat(_first_value(first, known)):
            return _by_value(known, _first_value(first, known))
    if {"instruction", "output"} <= set(names):
        columns = tuple(name for name in ("instruction", "input", "output") if name in names)
        return RowFormat("chat", columns, "Alpaca instructions", _pair(columns[:-1], columns[-1]))
    for question in _QUESTIONS:
        for answer in _ANSWERS:
            if {question, answer} <= set(names):
                title = f"chats of a {question} and its {answer}"
                return RowFormat("chat", (question, answer), title, _pair((question,), answer))
    strings = [name for name in names if isinstance(_first_value(first, name), str)]
    if len(strings) == 1:
        return _by_value(strings[0], _first_value(first, strings[0]))
    raise InputError(f"which column holds the text? choose with --text-column: {', '.join(names)}")


def _first_value(rows: Sequence[Row], column: str) -> Any:
    """Return the first value of a column that is not empty."""
    for row in rows:
        value = row.get(column)
        while isinstance(value, list) and value and isinstance(value[0], list):
            value = value[0]  # a processor returns a batch of one
        if value.strip() if isinstance(value, str) else value is not None and value != []:
            return value
    return None


def _by_value(column: str, value: Any) -> RowFormat:
    if column == TOKEN_COLUMN and value is None:
        raise InputError(f"column {column!r} holds no token ids: nothing to measure")
    if value is None:
        raise InputError(
            f"column {column!r} is empty in the first rows: choose another with --text-column"
        )
    if isinstance(value, list) and isinstance(value[0], int):
        return RowFormat("ids", (column,), "token ids", lambda row: row[column])
    style = _style(_as_chat(value)) if column != TEXT_COLUMN or isinstance(value, list) else None
    if style is not None:
        written = " written as JSON" if isinstance(value, str) else ""
        return RowFormat("chat", (column,), f"{style}{written}", _chat(column))
    if isinstance(value, str):
        return RowFormat("text", (column,), "text", _text(column))
    held = f"lists of {type(value[0]).__name__}" if isinstance(value, list) else "no text"
    if isinstance(value, list) and isinstance(value[0], dict):
        held = f"lists of {{{', '.join(value[0])}}}"
    raise InputError(
        f"column {column!r} holds {held}; expected text, token ids, or messages with role and "
        "content (or from and value): choose with --text-column"
    )


def _style(chat: list[Any] | None) -> str | None:
    if not chat or not isinstance(chat[0], dict):
        return None
    if {"role", "content"} <= set(chat[0]):
        return "chat messages"
    return "ShareGPT chats" if {"from", "value"} <= set(chat[0]) else None


def _as_chat(value: Any) -> list[Any] | None:
    """Return a list that is a list, or that is written as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def _text(column: str) -> Callable[[Row], str]:
    def read(row: Row) -> str:
        value = row[column]
        if value is not None and not isinstance(value, str):
            raise Unusable("no text")
        if not value or not value.strip():
            raise Unusable("empty")
        return value.strip()

    return read


def _chat(column: str) -> Callable[[Row], Chat]:
    def read(row: Row) -> Chat:
        if not row[column]:
            raise Unusable("empty")
        chat = _as_chat(row[column])
        if chat is None or not all(isinstance(message, dict) for message in chat):
            raise Unusable("no chat")
        style = _style(chat)
        if style is None:
            raise Unusable("no chat")
        if style != "chat messages":
            chat = [
                {"role": _ROLES.get(str(m.get("from")), m.get("from")), "content": m.get("value")}
                for m in chat
            ]
        if not any(_says_something(message) for message in chat):
            raise Unusable("empty")
        return chat

    return read


def _says_something(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(
        message.get("tool_calls")
    )


def _pair(questions: tuple[str, ...], answer: str) -> Callable[[Row], Chat]:
    """Return what makes a chat of two messages; either side may be a list of messages already."""

    def read(row: Row) -> Chat:
        asked = [row[name] for name in questions]
        if isinstance(asked[0], list) or isinstance(row[answer], list):
            chat = [*_messages(asked[0], "user"), *_messages(row[answer], "assistant")]
        else:
            if not all(isinstance(text, str | None) for text in (*asked, row[answer])):
                raise Unusable("no text")
            question = "\n\n".join(text.strip() for text in asked if text and text.strip())
            chat = [*_messages(question, "user"), *_messages(row[answer], "assistant")]
        if len(chat) < 2:
            raise Unusable("empty")
        return chat

    return read


def _messages(value: Any, role: str) -> Chat:
    if isinstance(value, str):
        return [{"role": role, "content": value.strip()}] if value.strip() else []
    return [message for message in value or [] if isinstance(message, dict)]
