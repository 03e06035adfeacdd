"""Chats as text, by a tokenizer's template."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_arm.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = datetime(2024, 7, 26)
"""Today, for templates that print it: the day that Llama's templates fall back on.

So that the same data are the same tokens on every day.
"""

_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuVeDFTR"


def render(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], *, generate: bool = False
) -> str:
    """Return a chat as the model reads it, with the template's own special tokens.

    ``generate`` ends it where an answer begins.

    Raises:
        ValueError: the template refuses the chat.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            chat,
            chat_template=_dated(tokenizer.get_chat_template()),
            tokenize=False,
            add_generation_prompt=generate,
        )
    except Exception as error:  # a template is a program of its own and may raise anything
        raise ValueError(first_line(error)) from error
    return text


def tokenise_rendered(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the token ids of rendered chats: their templates have written special tokens."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def read_template(text: str) -> str:
    """Return the chat template that ``--chat-template`` means: a file's content, or itself.

    Raises:
        InputError: neither a file nor a template.
    """
    if "{%" in text or "{{" in text:
        return text
    path = Path(text).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"--chat-template {text}: no such file, and no template (which has {{{{ or {{% in it)"
        ) from error


def _dated(template: str) -> str:
    """Return the template with its clock stopped at ``TEMPLATE_DATE``.

    transformers offers templates a function ``strftime_now`` and lets nobody replace it; a macro
    of that name, before the template, comes first.
    """
    if "strftime_now" not in template:
        return template
    # %-d and the like, known on some systems only, are numbers without a leading zero.
    values = {f"%-{d}": TEMPLATE_DATE.strftime(f"%{d}").lstrip("0") or "0" for d in "dmyHIMSj"}
    values |= {f"%{d}": TEMPLATE_DATE.strftime(f"%{d}") for d in _DIRECTIVES}
    replaced = "".join(f"|replace({key!r}, {value!r})" for key, value in values.items())
    # The newline behind the macro is the one that templates drop behind a block.
    return (
        f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n{template}"
    )
