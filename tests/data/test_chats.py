"""Chat templates: given on the command line, and the same on every day."""

from __future__ import annotations

import datetime as clock
from pathlib import Path

import pytest
from transformers.utils import chat_template_utils

from mergekit_arm.data.chats import TEMPLATE_DATE, read_template, render
from mergekit_arm.errors import InputError
from tests.support.byte_tokenizer import TEMPLATE, byte_tokenizer

CHAT = [{"role": "user", "content": "hi"}]
DATED = (
    '\n{%- if strftime_now is defined %}{% set today = strftime_now("%d %b %Y, %A %H:%M %-d") %}'
    "{% else %}{% set today = 'unknown' %}{% endif %}Today: {{ today }} "
    "{% macro twice() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ twice() }}" + TEMPLATE
)


def at(monkeypatch: pytest.MonkeyPatch, moment: clock.datetime) -> None:
    """Let templates believe that it is ``moment``."""

    class Stopped(clock.datetime):
        @classmethod
        def now(cls, tz: clock.tzinfo | None = None) -> clock.datetime:
            return moment

    monkeypatch.setattr(chat_template_utils, "datetime", Stopped)


def test_a_template_with_a_date_is_the_same_after_midnight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = byte_tokenizer(DATED)
    plain, pinned = [], []
    for moment in (clock.datetime(2026, 11, 24, 23, 59), clock.datetime(2026, 11, 25, 0, 1)):
        at(monkeypatch, moment)
        plain.append(tokenizer.apply_chat_template(CHAT, tokenize=False))
        pinned.append(render(tokenizer, CHAT))
    assert plain[0] != plain[1]  # the trap is there
    assert pinned[0] == pinned[1]
    at(monkeypatch, TEMPLATE_DATE)
    assert pinned[0] == tokenizer.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize("directive", list("aAwdbBmyYHIpMSfjUWcxXGuVeDFTRzZ"))
def test_every_directive_of_a_date(directive: str) -> None:
    tokenizer = byte_tokenizer(f"{{{{ strftime_now('[%{directive}]') }}}}")
    assert render(tokenizer, CHAT) == TEMPLATE_DATE.strftime(f"[%{directive}]")


@pytest.mark.parametrize("template", ["\n" + TEMPLATE, "  " + TEMPLATE, "{#- c #}\n\n" + TEMPLATE])
def test_stopping_the_clock_changes_nothing_else(template: str) -> None:
    with_date = byte_tokenizer(template + "{{ strftime_now('') }}")
    expected = byte_tokenizer(template).apply_chat_template(CHAT, tokenize=False)
    assert render(with_date, CHAT) == expected == render(byte_tokenizer(template), CHAT)


def test_a_template_is_a_file_or_itself(tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    assert read_template(str(tmp_path / "template.jinja")) == TEMPLATE
    assert read_template(TEMPLATE) == TEMPLATE
    with pytest.raises(InputError, match="no such file, and no template"):
        read_template(str(tmp_path / "templat.jinja"))
