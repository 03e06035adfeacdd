"""Data sets that are none, are broken, or hold what the model cannot take."""

from __future__ import annotations

import gzip
import json
import resource
from pathlib import Path

import pytest

from mergekit_arm.cli.main import cli
from tests.hostile.refusals import assert_refused, run

Case = tuple[str, str, bytes, str, tuple[str, ...]]

TEXT = b'{"text": "some words and then some more of them"}\n'
CHAT = b'{"messages": [{"role": "user", "content": "hello there, who are you?"}]}\n'
UNREADABLE = ("cannot be read", "mend it or give another --dataset")
COLUMN = ("--text-column",)
NOTHING = ("nothing to measure",)


def ids(*values: object, column: str = "input_ids") -> bytes:
    return b"".join(json.dumps({column: row}).encode() + b"\n" for row in values)


DATA: list[Case] = [
    # What is no data set at all.
    ("no such file", "", b"", "no.jsonl", ("no.jsonl", "no such file")),
    ("no such directory", "", b"", "./nowhere", ("./nowhere", "no such file or directory")),
    ("no file of a pattern", "", b"", "./no-*.jsonl", ("./no-*.jsonl", "no file matches")),
    ("a name on the Hub", "", b"", "nobody/words", ("nobody/words", "--dataset FILE")),
    ("a weight of nothing", "x.jsonl", TEXT, "x.jsonl:0", ("x.jsonl:0", "above 0")),
    ("a model", "", b"", "./base", ("./base", "this is a model", "name the text")),
    ("an unknown suffix", "x.docx", TEXT, "./x.docx", (".docx", "use one of", ".jsonl")),
    ("no suffix", "x", TEXT, "./x", ("without suffix", "use one of")),
    ("several kinds", "x.txt", b"words", "./[xt]*", ("several kinds", "one --dataset for each")),
    ("a program", "x.jsonl", b"\x7fELF\x02\x01" + bytes(range(256)) * 40, "", UNREADABLE),
    ("zeros", "x.jsonl", bytes(5000), "", ("x.jsonl", "holds no rows", "another --dataset")),
    ("a picture for a table", "x.csv", b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe", "", UNREADABLE),
    ("text for parquet", "x.parquet", TEXT, "", UNREADABLE),
    ("half a parquet", "x.parquet", b"PAR1" + bytes(60) + b"PAR1", "", UNREADABLE),
    ("text for gzip", "x.jsonl.gz", TEXT, "", UNREADABLE),
    ("half a gzip", "x.jsonl.gz", gzip.compress(TEXT * 99)[:-20], "", UNREADABLE),
    ("text for zstd", "x.jsonl.zst", TEXT, "", UNREADABLE),
    ("text for xz", "x.jsonl.xz", TEXT, "", UNREADABLE),
    ("text for bz2", "x.txt.bz2", TEXT, "", UNREADABLE),
    ("nothing in it", "x.jsonl", b"", "", ("empty", "give one that has rows")),
    ("blank lines", "x.jsonl", b"\n\n\n", "", UNREADABLE),
    # JSON that is none, or not rows.
    ("half a row", "x.jsonl", TEXT + b'{"text": "some', "", UNREADABLE),
    ("no JSON", "x.jsonl", b"text: words\n", "", UNREADABLE),
    ("numbers for rows", "x.jsonl", b"1\n2\n3\n", "", UNREADABLE),
    ("a list for rows", "x.jsonl", b"[1, 2]\n", "", ("holds no text", *COLUMN)),
    ("a word for rows", "x.json", b'"words"', "", UNREADABLE),
    ("rows without fields", "x.jsonl", b"{}\n{}\n", "", UNREADABLE),
    ("columns that change", "x.jsonl", TEXT + b'{"text": {"a": 1}}\n', "",
     ("'text' holds no text", *COLUMN)),
    ("invalid UTF-8", "x.jsonl", b'{"text": "\xff\xfe\x80 words"}\n', "", UNREADABLE),
    ("invalid UTF-8 in text", "x.txt", b"words \xff\xfe\x80 words", "", UNREADABLE),
    ("UTF-16", "x.jsonl", TEXT.decode().encode("utf-16"), "", UNREADABLE),
    ("a lone surrogate", "x.jsonl", b'{"text": "\\ud800"}\n' * 9, "", UNREADABLE),
    ("a bottomless row", "x.jsonl", b'{"text": ' + b"[" * 20_000 + b"\n", "", UNREADABLE),
    ("a long line of no JSON", "x.jsonl", b"a" * 12_000_000, "", UNREADABLE),
    ("a long line of zeros", "x.jsonl", b'{"text": "' + bytes(12_000_000), "", UNREADABLE),
    # Columns.
    ("another column", "x.jsonl", TEXT, "--text-column txet", ("txet", "did you mean 'text'")),
    ("which column", "x.jsonl", b'{"a": "x y", "b": "z"}\n', "", ("a, b", *COLUMN)),
    ("a column of numbers", "x.jsonl", b'{"text": 7}\n', "", ("'text' holds no text", *COLUMN)),
    ("a column of nothing", "x.jsonl", b'{"text": null}\n', "", ("'text' is empty", *COLUMN)),
    ("a column of blanks", "x.jsonl", b'{"text": "  "}\n', "", ("'text' is empty", *COLUMN)),
    ("lists of words", "x.jsonl", b'{"text": ["a", "b"]}\n', "", ("lists of str", *COLUMN)),
    ("too few words", "x.jsonl", b'{"text": "hi"}\n', "", ("2 tokens", "--sequence-length")),
    ("a split of a file", "x.jsonl", TEXT, "--split test", ("--split test", "leave it out")),
    ("chats without a template", "x.jsonl", CHAT * 9, "", ("--chat-template", "--tokenizer")),
    ("a template that breaks", "x.jsonl", CHAT * 9, "--chat-template {{m.x.y}}",
     ("chat template refuses every row",)),
    ("a template that is none", "x.jsonl", CHAT * 9, "--chat-template {%for", ("template",)),
    ("messages that are words", "x.jsonl", b'{"messages": "hello"}\n', "",
     ("5 tokens", "--sequence-length")),
    ("messages without a role", "x.jsonl", b'{"messages": [{"a": "b"}]}\n', "", ("{a}", *COLUMN)),
    # Token ids.
    ("ids beyond the vocabulary", "x.jsonl", ids([1, 2, 999], [4, 5, 6]), "",
     ("999", "256", "tokenizer")),
    ("negative ids", "x.jsonl", ids([1, -2, 3]), "", ("token id -2", "the model's tokenizer")),
    ("huge ids", "x.jsonl", ids([1, 2**62]), "", (str(2**62), "the model's tokenizer")),
    ("ids beyond counting", "x.jsonl", ids([1, 2**70]), "", ("lists of float", *COLUMN)),
    ("fractions of ids", "x.jsonl", ids([1.5, 2.5]), "", ("input_ids", *COLUMN)),
    ("ids as words", "x.jsonl", ids(["1", "2"]), "", ("input_ids", *COLUMN)),
    ("no ids", "x.jsonl", ids([], []), "", NOTHING),
    ("ids of null", "x.jsonl", ids(None), "", NOTHING),
    ("a mask of another length", "x.jsonl",
     b'{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}\n', "", ("attention_mask",)),
    ("a mask of nothing", "x.jsonl",
     b'{"input_ids": [1, 2], "attention_mask": [0, 0]}\n', "", NOTHING),
    ("a mask in words", "x.jsonl",
     b'{"input_ids": [1, 2], "attention_mask": ["a", "b"]}\n', "",
     ("no numbers in 'attention_mask'", "leave")),
]  # fmt: skip
"""Name, file and its content, ``--dataset`` or more options, and what the line says."""


@pytest.mark.parametrize("case", DATA, ids=[case[0] for case in DATA])
def test_data(case: Case, here: Path) -> None:
    _, name, content, options, said = case
    if name:
        (here / name).write_bytes(content)
    dataset, _, rest = ("", "", options) if options.startswith("--") else options.partition(" ")
    words = [rest.partition(" ")[0], rest.partition(" ")[2]] if rest else []
    result = run(
        here, cli, "calibrate", "./speaker", "./out", "--dataset", dataset or f"./{name}",
        "--sequence-length", "8", "--samples", "4", "--statistics", "importance", *words,
    )  # fmt: skip
    assert_refused(result, said)


def test_what_is_whole_is_measured(here: Path) -> None:
    (here / "x.jsonl").write_bytes(TEXT * 9)
    result = run(
        here, cli, "calibrate", "./speaker", "./out", "--dataset", "./x.jsonl",
        "--sequence-length", "8", "--samples", "4", "--statistics", "importance",
    )  # fmt: skip
    assert result.code == 0, result.output


@pytest.mark.parametrize("megabytes", [12, pytest.param(100, marks=pytest.mark.long)])
def test_a_long_line_is_cut(megabytes: int, here: Path) -> None:
    """One row, longer than the reader takes at once, is a text like any other."""
    (here / "x.jsonl").write_text(json.dumps({"text": "word " * (megabytes * 200_000)}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run(
        here, cli, "calibrate", "./speaker", "./out", "--dataset", "./x.jsonl",
        "--sequence-length", "8", "--samples", "4", "--statistics", "importance",
    )  # fmt: skip
    assert result.code == 0, result.output
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    print(f"{megabytes} MB in one line: {grown:.0f} MB of memory")  # noqa: T201  what pytest -s shows
    assert grown < 200 + 5 * megabytes
