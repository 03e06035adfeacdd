"""Values put into a shell command as parameters, so that no character in them means anything."""

from __future__ import annotations

from collections.abc import Sequence


def with_parameters(command: str, names: Sequence[str]) -> str:
    """Return ``command`` with each ``{name}`` replaced by the shell's parameter of its number.

    The first of ``names`` is ``$1``. The command says where it stands: between words and within
    double or single quotes, in ``$(…)`` too, the value arrives whole, spaces and quotes and all.
    """
    placeholders = {f"{{{name}}}": number for number, name in enumerate(names, start=1)}
    out: list[str] = []
    quotes = [""]
    """Of what the position is in: a quote, or nothing; another pair for every ``$(``."""
    index = 0
    while index < len(command):
        found = next((one for one in placeholders if command.startswith(one, index)), None)
        if found is not None:
            out.append(_parameter(placeholders[found], quotes[-1]))
            index += len(found)
            continue
        length = _advance(command, index, quotes)
        out.append(command[index : index + length])
        index += length
    return "".join(out)


def _parameter(number: int, quote: str) -> str:
    if quote == '"':
        return f"${{{number}}}"
    # Within single quotes nothing is replaced: they end, and begin again behind it.
    return f"'\"${{{number}}}\"'" if quote == "'" else f'"${{{number}}}"'


def _advance(command: str, index: int, quotes: list[str]) -> int:
    """Follow the quotes over one character, and return how many characters belong to it."""
    here, quote = command[index], quotes[-1]
    if quote == "'":
        if here == "'":
            quotes[-1] = ""
        return 1
    if here == "\\":
        return 2
    if command.startswith("$(", index):
        quotes.append("")
        return 2
    if here == '"':
        quotes[-1] = "" if quote else '"'
    elif not quote and here == "'":
        quotes[-1] = "'"
    elif not quote and here == ")" and len(quotes) > 1:
        quotes.pop()
    elif not quote and here == "#" and (index == 0 or command[index - 1].isspace()):
        rest = command[index:].partition("\n")[0]
        return len(rest)  # a comment, whose apostrophes quote nothing
    return 1
