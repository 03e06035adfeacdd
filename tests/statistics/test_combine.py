"""Adding statistics that were measured apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from mergekit_arm.data.blocks import build_corpus
from mergekit_arm.errors import InputError
from mergekit_arm.statistics.combine import combine
from mergekit_arm.statistics.read import Statistics
from tests.support import forks
from tests.support.byte_tokenizer import TEMPLATE, byte_tokenizer
from tests.support.edits import edit
from tests.support.equality import assert_same_statistics, load_statistics

Calibrate = Callable[..., Path]


@pytest.fixture
def part(family: Path, token_file: Path, tmp_path: Path) -> Calibrate:
    """Return a function that measures some rows of the tokens with sketches kept."""
    lines = token_file.read_text().splitlines(keepends=True)

    def run(name: str, rows: slice = slice(None), **options: Any) -> Path:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(lines[rows]))
        settings = {"model": str(family / "base"), "keep_sketch": True, "batch_size": 1}
        calibrate(
            CalibrationOptions(
                out=str(tmp_path / name), **{"dataset": str(data), **settings, **options}
            )
        )
        return tmp_path / name

    return run


def test_the_sum_is_what_one_run_would_have_measured(part: Calibrate, tmp_path: Path) -> None:
    parts = [part("a", slice(0, 5)), part("b", slice(5, 6)), part("c", slice(6, 12))]
    whole = part("whole")
    combine([str(p) for p in parts], tmp_path / "sum")
    assert_same_statistics(tmp_path / "sum", whole, rtol=1e-6)
    metadata, tensors = load_statistics(tmp_path / "sum")
    assert (metadata.data.sequences, metadata.data.tokens) == (12, 384)
    assert metadata.model == Statistics("whole", whole).metadata.model
    assert torch.equal(tensors["rows"], load_statistics(whole)[1]["rows"])
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_the_order_does_not_matter(part: Calibrate, tmp_path: Path) -> None:
    names = [str(part("a", slice(0, 4))), str(part("b", slice(4, 8))), str(part("c", slice(8, 12)))]
    combine(names, tmp_path / "one" / "sum")
    combine(names[::-1], tmp_path / "other" / "sum")
    for path in (tmp_path / "one" / "sum").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / "sum" / path.name).read_bytes()


def test_sums_can_be_added_again(part: Calibrate, tmp_path: Path) -> None:
    a, b, c = part("a", slice(0, 4)), part("b", slice(4, 8)), part("c", slice(8, 12))
    combine([str(a), str(b)], tmp_path / "ab")
    combine([str(tmp_path / "ab"), str(c)], tmp_path / "abc")
    assert_same_statistics(tmp_path / "abc", part("whole"), rtol=1e-6)
    with pytest.raises(InputError, match=r"4 of 4 rows of data were measured in both|4 of 8 rows"):
        combine([str(tmp_path / "ab"), str(b)], tmp_path / "abb")


def test_sketches_add_up_by_the_matrix_that_lies_beside_them(
    part: Calibrate, tmp_path: Path
) -> None:
    a, b = part("a", slice(0, 6), rank=8), part("b", slice(6, 12), rank=8)
    combine([str(a), str(b)], tmp_path / "sum")
    assert_same_statistics(tmp_path / "sum", part("whole", rank=8), rtol=1e-6)
    omega = Statistics("sum", tmp_path / "sum").stored("sketch_matrix.32")
    assert omega.shape == (32, 8)
    c = shutil.copytree(b, tmp_path / "c")
    tensors = load_file(c / "model.safetensors")
    tensors["sketch_matrix.32"] = tensors["sketch_matrix.32"] + 1
    save_file(tensors, edit(c) / "model.safetensors")
    with pytest.raises(InputError, match="drawn from different random numbers"):
        combine([str(a), str(c)], tmp_path / "other")


def test_parts_of_one_data_set_share_nothing(part: Calibrate, tmp_path: Path) -> None:
    parts = [part(f"part{i}", part=f"{i}/3") for i in (1, 2, 3)]
    assert all(Statistics("p", p).metadata.data.sequences for p in parts)
    combine([str(p) for p in parts], tmp_path / "sum")
    assert_same_statistics(tmp_path / "sum", part("whole"), rtol=1e-6)
    assert Statistics("sum", tmp_path / "sum").metadata.data.part is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype was float32 for one and bfloat16|dtype was bfloat16"),
        ({"rank": 7}, "rank was (7|None) for one"),
        ({"energy": 0.5}, r"energy was [0-9.]+ for one"),
        ({"skip_first": 2}, "skip first was (0|2) for one"),
        ({"subspace_tokens": 9}, "subspace tokens was"),
        ({"statistics": ("importance",)}, "statistics was"),
        ({"keep_sketch": False}, "finished subspaces, which do not add up: .*--keep-sketch"),
        ({"model": "a"}, "different models"),
    ],
)
def test_what_does_not_add_up(
    options: dict[str, Any], message: str, part: Calibrate, family: Path, tmp_path: Path
) -> None:
    if "model" in options:
        options = {"model": str(family / options["model"])}
    a, b = part("a", slice(0, 6)), part("b", slice(6, 12), **options)
    with pytest.raises(InputError, match=message) as error:
        combine([str(a), str(b)], tmp_path / "sum")
    assert str(b) in error.value.message or str(a) in error.value.message
    assert not (tmp_path / "sum").exists()


def test_seeds_decide_only_which_rows_unless_sketches_are_drawn(
    part: Calibrate, tmp_path: Path
) -> None:
    a, b = part("a", slice(0, 6)), part("b", slice(6, 12), seed=1)
    metadata = combine([str(a), str(b)], tmp_path / "sum")
    assert metadata.data.seed is None
    assert_same_statistics(tmp_path / "sum", part("whole"), rtol=1e-6)
    c, d = part("c", slice(0, 6), rank=8), part("d", slice(6, 12), rank=8, seed=1)
    with pytest.raises(InputError, match=r"drawn with seed (42|1) for one and (42|1)"):
        combine([str(c), str(d)], tmp_path / "sketches")


def test_a_sketch_matrix_that_is_missing_is_named(part: Calibrate, tmp_path: Path) -> None:
    a, b = part("a", slice(0, 6), rank=8), part("b", slice(6, 12), rank=8)
    tensors = load_file(b / "model.safetensors")
    del tensors["sketch_matrix.32"]
    save_file(tensors, b / "model.safetensors")
    with pytest.raises(InputError, match=r"are damaged: it has no tensor sketch_matrix\.32"):
        combine([str(a), str(b)], tmp_path / "sum")


def test_chats_and_text_add_up_and_the_record_says_both(family: Path, tmp_path: Path) -> None:
    byte_tokenizer(TEMPLATE).save_pretrained(tmp_path / "tokenizer")
    letters = "abcdefghijkl"
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": letter * 40}) + "\n" for letter in letters)
    )
    chats = ([{"role": "u", "content": letter * 30}] for letter in letters)
    (tmp_path / "chats.jsonl").write_text(
        "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    )
    shared: dict[str, Any] = {
        "model": str(small_bytes(tmp_path)),
        "tokenizer": str(tmp_path / "tokenizer"),
        "keep_sketch": True,
        "sequence_length": 8,
        "samples": 9,
    }
    given: dict[str, dict[str, Any]] = {
        "text": {"dataset": "text.jsonl", "max_tokens_per_row": 8},
        "chats": {"dataset": "chats.jsonl", "max_tokens_per_row": 16, "recipe": "packed"},
    }
    for name, own in given.items():
        own["dataset"] = str(tmp_path / own["dataset"])
        calibrate(CalibrationOptions(out=str(tmp_path / name), **{**shared, **own}))
    data = combine([str(tmp_path / name) for name in given], tmp_path / "sum").data
    one, other = (Statistics(n, tmp_path / n).metadata.data for n in given)
    assert data.tokens == one.tokens + other.tokens
    assert data.template_hash == other.template_hash
    assert data.template_hash is not None
    assert data.max_tokens_per_row == 16
    assert data.tokenizer == shared["tokenizer"]
    assert data.seed == 42
    assert set(data.dataset.split(" + ")) == {one.dataset, other.dataset}


def small_bytes(folder: Path) -> Path:
    """Write a Llama with a token for each byte."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "bytes")
    return folder / "bytes"


def test_what_mixtures_gave_is_in_the_sum(part: Calibrate, tmp_path: Path) -> None:
    rows = (part("x", slice(0, 3)), part("y", slice(3, 6)))  # which writes x.jsonl and y.jsonl
    mixed = part("mixed", dataset=tuple(f"{path}.jsonl" for path in rows))
    alone = part("alone", slice(6, 12))
    data = combine([str(mixed), str(alone)], tmp_path / "sum").data
    assert data.mixture is not None
    found = {Path(one.dataset).name: (one.sequences, one.tokens) for one in data.mixture}
    assert found == {"x.jsonl": (3, 96), "y.jsonl": (3, 96), "alone.jsonl": (6, 192)}


def test_importance_needs_no_sketch(part: Calibrate, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"statistics": ("importance",), "keep_sketch": False}
    a, b = part("a", slice(0, 6), **settings), part("b", slice(6, 12), **settings)
    combine([str(a), str(b)], tmp_path / "sum")
    assert_same_statistics(tmp_path / "sum", part("whole", **settings), rtol=1e-6)


@pytest.mark.parametrize("rows", [slice(None), slice(5, 9)])
def test_data_must_be_disjoint(rows: slice, part: Calibrate, tmp_path: Path) -> None:
    a, b = part("a", slice(0, 6)), part("b", rows)
    with pytest.raises(InputError, match=r"\d of \d+ rows of data were measured in both"):
        combine([str(a), str(b)], tmp_path / "sum")
    with pytest.raises(InputError, match="measured in both"):
        combine([str(a), str(a)], tmp_path / "sum")


def test_directories_that_do_not_say_what_they_measured(part: Calibrate, tmp_path: Path) -> None:
    a, b = part("a", slice(0, 6)), part("b", slice(6, 12))
    tensors = load_file(b / "model.safetensors")
    del tensors["rows"]
    save_file(tensors, edit(b) / "model.safetensors")
    with pytest.raises(InputError, match="does not say which rows"):
        combine([str(a), str(b)], tmp_path / "sum")


def test_an_existing_directory(part: Calibrate, tmp_path: Path) -> None:
    a, b = str(part("a", slice(0, 6))), str(part("b", slice(6, 12)))
    with pytest.raises(InputError, match="two or more"):
        combine([a], tmp_path / "sum")
    combine([a, b], tmp_path / "sum")
    with pytest.raises(InputError, match="add --force"):
        combine([a, b], tmp_path / "sum")
    combine([a, b], tmp_path / "sum", force=True)


def test_the_command(part: Calibrate, tmp_path: Path) -> None:
    a, b = part("a", slice(0, 6)), part("b", slice(6, 12))
    command = ("mergekit-arm", "combine", a, b, tmp_path / "sum")
    done = forks.run(*command)
    assert done.returncode == 0, done.stderr
    assert "12 sequences, 384 tokens" in " ".join(done.stdout.split())
    done = forks.run(*command)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}
    spelled = Tokenizer(models.WordLevel(letters, unk_token=" "))
    spelled.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=spelled)


def corpus_of(texts: list[str], tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    settings = {"split": None, "column": None, "samples": 100, "sequence_length": 4, "seed": 0}
    return build_corpus(
        datasets.Dataset.from_dict({"text": texts}), tokenizer, **{**settings, **options}
    )


def test_rows_of_text_are_known_by_content(tokenizer: PreTrainedTokenizerFast) -> None:
    """However rows are shuffled and cut, the same text is the same row."""
    texts = ["one text", "another text", "  one text ", "a third"]
    one = corpus_of(texts, tokenizer)
    other = corpus_of(texts[1:], tokenizer, seed=5, sequence_length=3)
    assert len(one.rows) == 3
    assert len(other.rows) == 3
    assert set(one.rows.tolist()) == set(other.rows.tolist())


def test_only_rows_that_were_measured_count(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"row {letter}" for letter in "abcdefghij"]
    assert len(corpus_of(texts, tokenizer, samples=2, sequence_length=5).rows) == 2
    assert len(corpus_of(texts, tokenizer, samples=2, sequence_length=6).rows) == 3


def test_equal_rows_fall_into_one_part(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [f"row {letter}" for letter in "abcdefghijklmnop"] * 3
    parts = [corpus_of(texts, tokenizer, part=(i, 4)) for i in range(4)]
    rows = [row for part in parts for row in part.rows.tolist()]
    assert len(rows) == len(set(rows)) == 16
    assert sum(part.tokens for part in parts) > 200
    assert json.dumps(sorted(rows)) == json.dumps(corpus_of(texts, tokenizer).rows.tolist())
