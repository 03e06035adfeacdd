"""Several data sets, mixed by weight; rows that are too long; the AIM authors' rule."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mergekit_arm.cli.calibrate import command
from mergekit_arm.data.blocks import Corpus
from mergekit_arm.data.corpus import read_corpus
from mergekit_arm.data.settings import DataSettings, Share, apportion, parse_share
from mergekit_arm.errors import InputError
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.models import tiny_llama


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def read(*names: str, **settings: Any) -> Corpus:
    defaults: dict[str, Any] = {"samples": 10, "sequence_length": 8, "seed": 1}
    return read_corpus(DataSettings(datasets=names, **{**defaults, **settings}), byte_tokenizer())


def texts_of(corpus: Corpus) -> list[str]:
    tokenizer = byte_tokenizer()
    return [str(tokenizer.decode(block)) for block in corpus.blocks]


@given(st.lists(st.floats(0.2, 5), min_size=1, max_size=6), st.integers(60, 300))
def test_sequences_are_divided_by_weight(weights: list[float], samples: int) -> None:
    shares = [Share(str(i), weight) for i, weight in enumerate(weights)]
    counts = apportion(shares, samples)
    assert sum(counts) == samples
    for share, count in zip(shares, counts, strict=True):
        assert abs(count - samples * share.weight / sum(weights)) < 1


def test_a_weight_is_a_number_behind_the_last_colon(tmp_path: Path) -> None:
    assert parse_share("org/data:3") == Share("org/data", 3)
    assert parse_share("./a.jsonl:0.25") == Share("./a.jsonl", 0.25)
    assert parse_share("C:/data.jsonl") == Share("C:/data.jsonl", 1)
    assert parse_share("./a:b.jsonl") == Share("./a:b.jsonl", 1)
    file = write(tmp_path / "odd:7", ["x"])
    assert parse_share(file) == Share(file, 1)
    assert parse_share(f"{file}:2") == Share(file, 2)
    with pytest.raises(InputError, match="above 0"):
        parse_share("org/data:0")
    with pytest.raises(InputError, match="less than one of 3 sequences"):
        apportion([Share("a", 1), Share("b", 100)], 3)


def test_two_data_sets_are_mixed(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", ["a" * 8] * 30)
    two = write(tmp_path / "two.jsonl", ["b" * 8] * 30)
    corpus = read(f"{one}:3", f"{two}:1", samples=20)
    assert Counter(text[0] for text in texts_of(corpus)) == {"a": 15, "b": 5}
    assert [part.sequences for part in corpus.mixture] == [15, 5]
    assert [part.dataset for part in corpus.mixture] == [one, two]
    again = read(f"{one}:3", f"{two}:1", samples=20)
    assert corpus.content_hash() == again.content_hash()


def test_rows_that_stand_in_two_data_sets_are_said(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", ["a" * 8, "b" * 8])
    two = write(tmp_path / "two.jsonl", ["b" * 8, "c" * 8])
    said = "1 rows stand in more than one of these data sets, and count in each"
    assert said in read(one, two, samples=4).notes


def test_a_mixture_of_texts_and_of_token_ids(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", ["a" * 8] * 30)
    two = tmp_path / "two.jsonl"
    two.write_text("".join(json.dumps({"input_ids": [7] * n}) + "\n" for n in (3, 5, 20)))
    corpus = read(one, str(two), samples=6)
    assert corpus.lengths == [3, 5, 8, 8, 8, 20]
    assert corpus.column == "text + input_ids"
    assert not corpus.ready_ids


def test_a_data_set_that_has_too_little_says_so(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", ["a" * 8] * 30)
    two = write(tmp_path / "two.jsonl", ["b" * 8] * 2)
    corpus = read(one, two, samples=10)
    assert any("2 sequences, not 5" in note for note in corpus.notes)
    with pytest.raises(InputError, match=r"of the mixture, \./nowhere\.jsonl: .*no such file"):
        read(one, "./nowhere.jsonl")


def test_one_long_document_does_not_fill_everything(tmp_path: Path) -> None:
    """One of a thousand rows, which came first and gave all blocks."""
    texts = ["L" * 5000 if number == 500 else "s" * 12 for number in range(1000)]
    data = write(tmp_path / "data.jsonl", texts)
    for seed in range(4):
        corpus = read(data, samples=200, seed=seed)
        letters = Counter("".join(texts_of(corpus)))
        assert len(corpus.blocks) == 200
        assert letters["L"] <= 8


def test_long_documents_give_more_where_there_are_no_others(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", ["A" * 100, "B" * 100, "c" * 8])
    letters = Counter("".join(texts_of(read(data, samples=11))))
    assert letters == {"A": 40, "B": 40, "c": 8}


def test_the_limit_of_a_row_is_chosen(tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", ["abcdefghijklmnop"] * 10)
    assert set(texts_of(read(data, samples=5, max_tokens_per_row=4))) == {"abcdabcd"}
    assert set(texts_of(read(data, samples=6, max_tokens_per_row=16))) == {"abcdefgh", "ijklmnop"}
    with pytest.raises(InputError, match="takes no --max-tokens-per-row"):
        DataSettings(recipe="aim", max_tokens_per_row=4)


def authors_blocks(texts: list[str], samples: int, length: int, seed: int) -> list[list[int]]:
    """As the AIM authors' ``get_calib_dataset`` does it, after AWQ's, for any length."""
    tokenizer = byte_tokenizer()
    taken: list[int] = []
    count = 0
    for row in datasets.Dataset.from_dict({"text": texts}).shuffle(seed=seed):
        encoded = tokenizer.encode(row["text"].strip())
        if len(encoded) > length or not encoded:
            continue
        taken += encoded
        count += 1
        if count == samples:
            break
    return [taken[i * length : (i + 1) * length] for i in range(len(taken) // length)]


@pytest.mark.parametrize("samples", [5, 20, 1000])
def test_the_authors_recipe(samples: int, tmp_path: Path) -> None:
    texts = [f"{number} " + "x" * (number * 7 % 23) for number in range(100)]
    data = write(tmp_path / "data.jsonl", texts)
    corpus = read(data, samples=samples, sequence_length=16, recipe="aim", seed=42)
    expected = authors_blocks(texts, samples, 16, 42)
    assert [block.tolist() for block in corpus.blocks] == expected
    assert "longer than 16 tokens" in corpus.notes[0]
    assert corpus.requested == len(corpus.blocks)


def run(folder: Path, *arguments: str) -> Any:
    """Calibrate a model whose vocabulary holds the byte tokenizer's."""
    if not (folder / "model").exists():
        model = tiny_llama(0)
        model.resize_token_embeddings(256)
        model.save_pretrained(folder / "model")
    return CliRunner().invoke(
        command,
        [str(folder / "model"), str(folder / "out"), "--sequence-length", "8", *arguments],
        env={"COLUMNS": "300"},
    )


def test_the_command_records_and_shows_all_of_it(tmp_path: Path) -> None:
    """With a tokenizer that the model has not, and rows of two kinds."""
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    one = write(tmp_path / "one.jsonl", ["a" * 8] * 30 + [""])
    chats = [{"conversations": [{"from": "human", "value": "hello you"}]}] * 9
    two = tmp_path / "two.jsonl"
    two.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    data = ["--dataset", f"{one}:3", "--dataset", str(two), "--samples", "8"]
    refused = run(tmp_path, *data)
    assert refused.exit_code == 2
    assert "--tokenizer MODEL_OR_DIR" in refused.output
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer")]
    refused = run(tmp_path, *data, *tokenizer)
    assert refused.exit_code == 2
    assert "--chat-template FILE_OR_TEXT" in refused.output
    template = "{% for m in messages %}[/{{ m.role }}]{{ m.content }}{% endfor %}"
    dry = run(tmp_path, *data, *tokenizer, "--chat-template", template, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "The first block begins: 'aaaaaaaa'" in dry.output
    done = run(tmp_path, *data, *tokenizer, "--chat-template", template)
    assert done.exit_code == 0, done.output
    assert "read as ShareGPT chats, column conversations" in done.output
    assert "1 left out: 1 empty" in done.output
    record = json.loads((tmp_path / "out" / "activation_stats.json").read_text())["data"]
    assert record["dataset"] == f"{one} + {two}"
    assert record["column"] == "text + conversations"
    assert record["tokenizer"] == str(tmp_path / "tokenizer")
    assert [(part["weight"], part["sequences"]) for part in record["mixture"]] == [(3, 6), (1, 2)]


def test_a_dry_run_shows_text_that_looks_like_markup(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = write(tmp_path / "data.jsonl", ["[/INST] [x]"])
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer")]
    done = run(tmp_path, "--dataset", data, "--dry-run", *tokenizer)
    assert done.exit_code == 0, done.output
    assert "[/INST]" in done.output


def test_sequences_longer_than_the_model_takes(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = write(tmp_path / "data.jsonl", ["a" * 300])
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer"), "--sequence-length", "200"]
    done = run(tmp_path, "--dataset", data, *tokenizer)
    assert done.exit_code == 2
    assert "sequences of 200 tokens, but" in done.output
    assert "use --sequence-length 128" in done.output


def test_existing_data_gets_no_new_fields(family: Path) -> None:
    record = json.loads((family / "stats" / "activation_stats.json").read_text())["data"]
    assert set(record) == {"dataset", "column", "seed", "sequences", "tokens", "content_hash"}
