"""Names → files → rows: compressed, patterns, directories, large, empty."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import zstandard
from click.testing import CliRunner
from huggingface_hub.utils import are_progress_bars_disabled

from mergekit_arm.cli.calibrate import command
from mergekit_arm.data import files
from mergekit_arm.data.blocks import build_corpus
from mergekit_arm.data.rows import in_order, load_rows
from mergekit_arm.data.settings import DEFAULT_DATASET
from mergekit_arm.errors import InputError
from tests.support import forks
from tests.support.byte_tokenizer import byte_tokenizer

TEXTS = [f"text number {number}" for number in range(20)]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts_of(name: Path | str, **options: Any) -> list[str]:
    loaded, _ = load_rows(str(name), None, None, **options)
    return [row["text"] for row in loaded]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("streamed", [False, True])
def test_compressed_files(
    suffix: str, streamed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LARGE", 0 if streamed else 10**9)
    path = tmp_path / f"data.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](lines(TEXTS)))
    loaded, split = load_rows(str(path), None, None)
    assert isinstance(loaded, datasets.IterableDataset) is streamed
    assert [row["text"] for row in loaded] == TEXTS
    assert split is None


def test_compressed_text_is_read_by_paragraph(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n\nthree"))
    assert texts_of(tmp_path / "a.txt.gz") == ["one\ntwo", "three"]


def test_the_default_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that is laid out like it, in the place of the Hub."""
    (tmp_path / "val.jsonl.zst").write_bytes(zstandard.compress(lines(TEXTS)))
    asked: list[tuple[Any, ...]] = []
    load = datasets.load_dataset

    def local(name: str, subset: str | None, **options: Any) -> Any:
        asked.append((name, options["split"], options.get("streaming", False)))
        return load(str(tmp_path), subset, **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    streamed, split = load_rows(DEFAULT_DATASET, None, None)
    assert split == "validation"
    assert [row["text"] for row in streamed] == TEXTS
    whole, _ = load_rows(DEFAULT_DATASET, None, None, whole=True)
    assert list(whole["text"]) == TEXTS
    assert asked == [(DEFAULT_DATASET, "validation", True), (DEFAULT_DATASET, "validation", False)]


def test_a_directory_laid_out_like_the_default_data_set(tmp_path: Path) -> None:
    (tmp_path / "val.jsonl.zst").write_bytes(zstandard.compress(lines(TEXTS)))
    loaded, split = load_rows(str(tmp_path), None, "validation")
    assert [row["text"] for row in loaded] == TEXTS
    assert split == "validation"


def test_only_what_is_used_of_a_large_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rest of the file could not even be read."""
    path = tmp_path / "large.jsonl"
    padding = "x" * 2000
    with path.open("wb") as file:
        for number in range(12_000):
            file.write(lines([f"{number} {padding}"]))
        file.write(b"{this is no JSON\n" * 1000)
    with pytest.raises(InputError, match="cannot be read"):
        load_rows(str(path), None, None)
    monkeypatch.setattr(files, "LARGE", 10_000_000)
    orders = []
    for seed in (1, 1, 2):
        loaded, split = load_rows(str(path), None, None)
        corpus = build_corpus(
            loaded,
            byte_tokenizer(),
            split=split,
            column=None,
            samples=16,
            sequence_length=64,
            seed=seed,
        )
        assert len(corpus.blocks) == len(corpus.rows) == 16
        orders.append(corpus.content_hash())
    assert orders[0] == orders[1] != orders[2]


def test_a_streamed_file_is_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGE", 0)
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(TEXTS))
    loaded, _ = load_rows(str(path), None, None)
    found = [row["text"] for row in in_order(loaded, 3)]
    assert found != TEXTS
    assert sorted(found) == sorted(TEXTS)


def test_a_small_file_keeps_the_order_of_a_full_shuffle(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(lines(TEXTS))
    loaded, _ = load_rows(str(path), None, None)
    expected = datasets.Dataset.from_dict({"text": TEXTS}).shuffle(seed=7)["text"]
    assert [row["text"] for row in in_order(loaded, 7)] == list(expected)


@pytest.mark.parametrize("name", ["calib[v2].jsonl", "what?.jsonl", "a*b.jsonl", "{x}.jsonl"])
def test_a_file_is_the_one_that_has_the_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(lines(["mine"]))
    for other in ("calibv.jsonl", "whats.jsonl", "aab.jsonl"):
        (tmp_path / other).write_bytes(lines(["another's"]))
    assert texts_of(tmp_path / name) == ["mine"]


def test_a_directory_with_brackets(tmp_path: Path) -> None:
    (tmp_path / "run[1]").mkdir()
    (tmp_path / "run[1]" / "a.jsonl").write_bytes(lines(["mine"]))
    assert texts_of(tmp_path / "run[1]") == ["mine"]


def test_a_pattern_where_no_file_has_the_name(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"part-{number}.jsonl").write_bytes(lines([str(number)]))
    assert texts_of(tmp_path / "part-*.jsonl") == ["0", "1", "2"]
    assert texts_of(tmp_path / "part-[12].jsonl") == ["1", "2"]
    with pytest.raises(InputError, match="no file matches"):
        load_rows(str(tmp_path / "no-*.jsonl"), None, None)
    (tmp_path / "part-x.txt").write_text("x")
    with pytest.raises(InputError, match=r"several kinds \(json, text\)"):
        load_rows(str(tmp_path / "part-*"), None, None)


def test_a_directory_is_all_files_in_it(tmp_path: Path) -> None:
    """Whatever ``datasets`` would take for splits, or for the one kind that counts."""
    for name in ("code", "chat"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([name]))
    (tmp_path / "README.md").write_text("# Mine\n")
    (tmp_path / ".hidden.jsonl").write_bytes(lines(["hidden"]))
    assert sorted(texts_of(tmp_path)) == ["chat", "code"]
    (tmp_path / "test_prompts.jsonl").write_bytes(lines(["test"]))
    with pytest.raises(InputError, match=r"test_prompts\.jsonl is named like a split, and chat"):
        load_rows(str(tmp_path), None, None)
    assert len(texts_of(tmp_path / "*.jsonl")) == 3
    (tmp_path / "test_prompts.jsonl").unlink()
    (tmp_path / "notes.txt").write_text("one\n\ntwo")
    with pytest.raises(InputError, match=r"several kinds \(json, text\)"):
        load_rows(str(tmp_path), None, None)


def test_a_file_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    """Also where it has the former one's name and time, as archives and copies set them."""
    path = tmp_path / "a.jsonl"
    for text in ("one", "two"):
        path.write_bytes(lines([text]))
        os.utime(path, (1e9, 1e9))
        assert texts_of(path) == [text]


def test_a_directory_of_text_is_read_as_the_file_is(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("one\ntwo\n\nthree")
    alone = texts_of(folder / "a.txt")
    assert alone == ["one\ntwo", "three"]
    assert texts_of(folder) == alone
    (folder / "more" / "b.txt").write_text("four\n  five")
    assert texts_of(folder) == [*alone, "four\n  five"]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.txt", "a.csv", "a.jsonl.gz", "a.jsonl.zst"]
)
def test_an_empty_file_is_a_mistake(name: str, family: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESS[path.suffix](b"") if path.suffix in COMPRESS else b"")
    done = CliRunner().invoke(
        command, [str(family / "base"), str(tmp_path / "out"), "--dataset", str(path)]
    )
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("Error: ")]
    assert "empty" in done.output or "holds no rows" in done.output, line
    assert not (tmp_path / "out").exists()


def test_a_broken_archive(tmp_path: Path) -> None:
    for suffix in (".gz", ".zst"):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(COMPRESS[suffix](lines(TEXTS))[:-20])
        with pytest.raises(InputError, match=r"cannot be read|holds no rows"):
            load_rows(str(tmp_path / f"a.jsonl{suffix}"), None, None)


def test_bars_of_downloads_stay(tmp_path: Path) -> None:
    """Reading a local file hides the library's bars and shows them again."""
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    datasets.enable_progress_bars()
    load_rows(str(tmp_path / "a.jsonl"), None, None)
    assert not datasets.are_progress_bars_disabled()


def calibrate_and_look(arguments: list[str]) -> None:
    command(arguments, standalone_mode=False)
    print(are_progress_bars_disabled(), datasets.are_progress_bars_disabled())  # noqa: T201


@pytest.mark.parametrize("quiet", [False, True])
def test_bars_of_downloads_stay_unless_quiet(quiet: bool, family: Path, token_file: Path) -> None:
    """In a process of its own, since the switches are the libraries' own."""
    arguments = [str(family / "base"), str(family / "unwritten"), "--dataset", str(token_file)]
    done = forks.Running(
        calibrate_and_look, [*arguments, "--dry-run", *(["--quiet"] if quiet else [])]
    ).end()
    assert done.stdout.split() == [str(quiet)] * 2, done.stderr


@pytest.mark.parametrize("large", [False, True])
def test_a_large_directory_is_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl"):
        (tmp_path / name).write_bytes(lines([f"{name} {number}" for number in range(5)]))
    monkeypatch.setattr(files, "LARGE", 1 if large else 10**9)
    rows, split = load_rows(str(tmp_path), None, None)
    assert isinstance(rows, datasets.IterableDataset if large else datasets.Dataset)
    assert split == "train"
    assert len(list(in_order(rows, 1, ["text"]))) == 10
