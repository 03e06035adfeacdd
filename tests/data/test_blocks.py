"""Rows → token blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from mergekit_arm.data.blocks import build_corpus
from mergekit_arm.data.rows import load_rows
from mergekit_arm.errors import InputError
from tests.support.byte_tokenizer import TEMPLATE, byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def build(rows: datasets.Dataset, tokenizer: Any, **changes: Any) -> Any:
    settings = {"split": None, "column": None, "samples": 4, "sequence_length": 8, "seed": 1}
    return build_corpus(rows, tokenizer, **{**settings, **changes})


def write(folder: Path, suffix: str, texts: list[str]) -> Path:
    path = folder / f"data{suffix}"
    if suffix == ".txt":
        path.write_text("\n\n".join(texts))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    elif suffix == ".csv":
        datasets.Dataset.from_dict({"text": texts}).to_csv(str(path))
    else:
        datasets.Dataset.from_dict({"text": texts}).to_parquet(str(path))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file(suffix: str, tmp_path: Path) -> None:
    texts = ["first paragraph,\nof two lines", "second", "third"]
    rows, split = load_rows(str(write(tmp_path, suffix, texts)), None, None)
    assert [row["text"] for row in rows] == texts
    assert split is None


def test_a_directory_and_a_saved_dataset(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    write(tmp_path / "files", ".jsonl", ["one", "two"])
    rows, _ = load_rows(str(tmp_path / "files"), None, None)
    assert len(rows) == 2
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(str(tmp_path / "saved"))
    rows, _ = load_rows(str(tmp_path / "saved"), None, None)
    assert rows[0]["text"] == "x"


def test_texts_are_concatenated_and_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"{number:05d}" for number in range(20)]
    corpus = build(datasets.Dataset.from_dict({"text": texts}), tokenizer)
    assert [len(block) for block in corpus.blocks] == [8] * 4
    joined = "".join(tokenizer.decode(block) for block in corpus.blocks)
    # Every text appears whole, one after the other, in shuffled order.
    pieces = [joined[start : start + 5] for start in range(0, 30, 5)]
    assert len(set(pieces)) == 6
    assert set(pieces) < set(texts)
    assert pieces != sorted(pieces)


def test_the_seed_decides_the_order(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"text {number}" for number in range(50)]})
    hashes = [build(rows, tokenizer, seed=seed).content_hash() for seed in (1, 1, 2)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_fewer_blocks_than_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    corpus = build(datasets.Dataset.from_dict({"text": ["12345678" * 2]}), tokenizer)
    assert (len(corpus.blocks), corpus.requested) == (2, 4)


def test_less_than_one_block(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InputError, match="has 3 tokens, less than one block of 8"):
        build(datasets.Dataset.from_dict({"text": ["abc"]}), tokenizer)


def test_chats_go_through_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = [{"role": "user", "content": "hi there"}, {"role": "bot", "content": "hello"}]
    rows = datasets.Dataset.from_list([{"messages": chat}])
    with pytest.raises(InputError, match="no chat template"):
        build(rows, tokenizer)
    tokenizer.chat_template = TEMPLATE
    try:
        corpus = build(rows, tokenizer, samples=1, sequence_length=24)
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(corpus.blocks[0]) == "<user>hi there<bot>hello"
    assert corpus.template_hash


def test_ready_ids_need_no_tokenizer() -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8]]})
    corpus = build(rows, None)
    assert sorted(block.tolist() for block in corpus.blocks) == [[1, 2, 3], [4, 5], [6, 7, 8]]
    assert corpus.lengths == [2, 3, 3]  # equal lengths side by side, so that batches fill
    assert corpus.stack(1, 2).shape == (2, 3)
    assert corpus.tokens == 8


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(InputError, match="needs a tokenizer"):
        build(datasets.Dataset.from_dict({"text": ["abc"]}), None)


def test_columns(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = datasets.Dataset.from_dict({"content": ["some long text"], "number": [1]})
    assert build(rows, tokenizer).column == "content"  # the only one that holds text
    with pytest.raises(InputError, match="did you mean 'content'"):
        build(rows, tokenizer, column="contnt")
    both = datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]})
    with pytest.raises(InputError, match="choose with --text-column: a, b"):
        build(both, tokenizer)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_rows("./nowhere.jsonl", None, None)
    (tmp_path / "data.xlsx").write_text("x")
    with pytest.raises(InputError, match=r"cannot read \.xlsx"):
        load_rows(str(tmp_path / "data.xlsx"), None, None)
    (tmp_path / "bad.jsonl").write_text("{not json")
    with pytest.raises(InputError, match="cannot be read"):
        load_rows(str(tmp_path / "bad.jsonl"), None, None)


def test_without_a_network_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match="--dataset FILE"):
        load_rows("mit-han-lab/pile-val-backup", None, None)


def test_splits(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"dev": one, "test": one}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(InputError, match="choose with --split"):
        load_rows(str(tmp_path / "saved"), None, None)
    with pytest.raises(InputError, match="did you mean 'test'"):
        load_rows(str(tmp_path / "saved"), None, "tets")
    assert load_rows(str(tmp_path / "saved"), None, "dev")[1] == "dev"


def test_a_split_of_a_single_file_is_a_mistake(tmp_path: Path) -> None:
    path = write(tmp_path, ".jsonl", ["one text"])
    assert len(load_rows(str(path), None, "train")[0]) == 1
    with pytest.raises(InputError, match=r"--split trian: .* is one file, without splits"):
        load_rows(str(path), None, "trian")
