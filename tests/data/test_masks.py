"""Padding never counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from mergekit_arm.data.blocks import build_corpus
from mergekit_arm.data.formats import Unusable
from mergekit_arm.data.masks import read_ids
from mergekit_arm.errors import InputError
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics
from tests.calibration.test_calibrate import layer_inputs
from tests.support.equality import assert_same_statistics
from tests.support.models import VOCABULARY, tiny_llama

Pairs = st.lists(st.tuples(st.integers(0, 90), st.booleans()), min_size=1, max_size=30)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(Pairs, st.booleans(), st.booleans(), st.sampled_from([int, bool]))
def test_masked_tokens_are_left_out(
    pairs: list[tuple[int, bool]], nested: bool, mask_nested: bool, kind: type
) -> None:
    ids, mask = [token for token, _ in pairs], [kind(kept) for _, kept in pairs]
    row = {
        "input_ids": [ids] if nested else ids,
        "attention_mask": [mask] if mask_nested else mask,
        "mm_token_type_ids": [[token % 2 for token in ids]],
    }
    expected = [token for token, kept in pairs if kept]
    if not expected:
        with pytest.raises(Unusable, match="padding"):
            read_ids(row, "input_ids")
        return
    found, extras = read_ids(row, "input_ids")
    assert found.tolist() == expected
    assert extras["mm_token_type_ids"].tolist() == [[token % 2 for token in expected]]
    assert "attention_mask" not in extras


@given(Pairs, Pairs)
def test_a_decoder_has_a_mask_of_its_own(
    pairs: list[tuple[int, bool]], answer: list[tuple[int, bool]]
) -> None:
    row = {
        "input_ids": [token for token, _ in pairs],
        "decoder_input_ids": [token for token, _ in answer],
        "decoder_attention_mask": [int(kept) for _, kept in answer],
    }
    found, extras = read_ids(row, "input_ids")
    assert found.tolist() == row["input_ids"]
    assert extras["decoder_input_ids"].tolist() == [[token for token, kept in answer if kept]]
    assert set(extras) == {"decoder_input_ids"}


def test_a_mask_of_another_length_is_refused() -> None:
    row = {"input_ids": [1, 2, 3], "attention_mask": [1, 1]}
    with pytest.raises(InputError, match="3 tokens in 'input_ids' and 2 in 'attention_mask'"):
        read_ids(row, "input_ids")


def test_a_mask_without_a_list_may_hide_the_only_token() -> None:
    with pytest.raises(Unusable, match="nothing but padding"):
        read_ids({"input_ids": [5], "attention_mask": 0}, "input_ids")
    with pytest.raises(Unusable, match="empty"):
        read_ids({"input_ids": [], "attention_mask": []}, "input_ids")


@pytest.mark.parametrize("column", ["input_ids", "attention_mask"])
def test_a_number_that_no_tensor_holds_is_refused(column: str) -> None:
    row = {"input_ids": [1, 2], "attention_mask": [1, 1], column: [10**400, 0.5]}
    with pytest.raises(InputError, match=f"'{column}'"):
        read_ids(row, "input_ids")


def test_the_mask_of_sounds_stays_with_them() -> None:
    row = {"input_ids": [1, 2], "input_features": [[0.5] * 4], "attention_mask": [[1, 1, 1, 0]]}
    _, extras = read_ids(row, "input_ids")
    assert extras["attention_mask"].tolist() == [[1, 1, 1, 0]]


def test_token_types_of_plain_text_are_nothing_beside_it() -> None:
    """A tokenizer writes zeros, which models assume."""
    ids, extras = read_ids({"input_ids": [1, 2], "token_type_ids": [0, 0]}, "input_ids")
    assert len(ids) == 2
    assert extras == {}
    assert read_ids({"input_ids": [1, 2], "token_type_ids": [0, 1]}, "input_ids")[1]


def rows_of_tokens(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        for length in (3, 9, 17, 24, 24, 31)
    ]


def padded(rows: list[list[int]], side: str, nested: bool) -> list[dict[str, Any]]:
    """Every row filled up to 32 with zeros, as tokenizers pad them; ``ragged`` to any."""
    found = []
    for number, ids in enumerate(rows):
        fill = 32 - len(ids) if side != "ragged" else number
        left = 0 if side == "right" else fill if side == "left" else fill // 2
        padded_ids = [0] * left + ids + [0] * (fill - left)
        mask = [0] * left + [1] * len(ids) + [0] * (fill - left)
        row = {"input_ids": padded_ids, "attention_mask": mask}
        found.append({name: [value] if nested else value for name, value in row.items()})
    return found


@pytest.mark.parametrize("side", ["left", "right", "ragged"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
def test_padded_rows_measure_as_the_rows_without(
    side: str, nested: bool, low_memory: bool, tmp_path: Path
) -> None:
    """Against own hooks on the rows without padding, and bit for bit."""
    model = tiny_llama(4)
    model.save_pretrained(tmp_path / "model")
    rows = rows_of_tokens(1)
    plain = write(tmp_path / "plain.jsonl", [{"input_ids": ids} for ids in rows])
    full = write(tmp_path / "padded.jsonl", padded(rows, side, nested))
    options = {"model": str(tmp_path / "model"), "batch_size": 1, "low_memory": low_memory}
    said: list[str] = []
    for name, data in (("plain", plain), ("padded", full)):
        calibrate(
            CalibrationOptions(out=str(tmp_path / name), dataset=str(data), **options),
            say=said.append,
        )
    assert not any("cannot be walked" in note for note in said)
    statistics = Statistics("padded", tmp_path / "padded")
    assert statistics.metadata.data.tokens == sum(map(len, rows))
    inputs = layer_inputs(model.float().eval(), plain)
    record = statistics.metadata.weights["model.layers.1.mlp.down_proj.weight"]
    expected = torch.cat([x[0] for x in inputs["model.layers.1.mlp.down_proj"]]).abs().mean(0)
    found = IMPORTANCE.values(statistics, record, "mean_abs").double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)
    assert_same_statistics(tmp_path / "plain", tmp_path / "padded")


def test_masks_of_ones_are_no_images(family: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows_of_tokens(2)]
    said: list[str] = []
    calibrate(
        CalibrationOptions(
            model=str(family / "base"),
            out=str(tmp_path / "stats"),
            dataset=str(write(tmp_path / "rows.jsonl", rows)),
            low_memory=True,
        ),
        say=said.append,
    )
    assert not any("cannot be walked" in note for note in said)


def test_rows_of_padding_are_left_out_and_counted() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 0]},
        {"input_ids": [0, 0, 0], "attention_mask": [0, 0, 0]},
        {"input_ids": [], "attention_mask": []},
    ]
    corpus = build_corpus(
        datasets.Dataset.from_list(rows),
        None,
        split=None,
        column=None,
        samples=9,
        sequence_length=8,
        seed=0,
    )
    assert [block.tolist() for block in corpus.blocks] == [[1, 2]]
    (note,) = corpus.notes
    assert "1 row used; 2 left out: 1 empty, 1 nothing but padding" in note


def test_an_over_long_row_is_cut_and_the_run_goes_on(tmp_path: Path) -> None:
    """The model takes 128 tokens."""
    tiny_llama(4).save_pretrained(tmp_path / "model")
    rows = [[1] * 20, [5] * 300, [7] * 20]
    data = write(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in rows])
    said: list[str] = []
    calibrate(
        CalibrationOptions(
            model=str(tmp_path / "model"), out=str(tmp_path / "stats"), dataset=str(data)
        ),
        say=said.append,
    )
    assert Statistics("s", tmp_path / "stats").metadata.data.tokens == 20 + 128 + 20
    assert any("1 of them cut at 128 tokens" in note for note in said)
