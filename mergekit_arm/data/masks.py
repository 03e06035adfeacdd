"""Rows of token ids: without padding, and with what the model is given beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_arm.data.formats import Unusable
from mergekit_arm.errors import InputError, first_line

MODEL_INPUTS = (
    "pixel_values",
    "pixel_values_videos",
    "image_grid_thw",
    "video_grid_thw",
    "image_sizes",
    "aspect_ratios",
    "token_type_ids",
    "mm_token_type_ids",
    "input_features",
    "attention_mask",
    "decoder_input_ids",
    "decoder_attention_mask",
)
"""Columns that, beside ``input_ids``, are passed to the model as its processor made them.

But the masks: what they hide is taken out instead, so that padding never counts.
"""

MASKS = ("attention_mask", "decoder_attention_mask")

_HIGHEST = (1 << 31) - 1
"""A token id that tokenizers still take."""
_NO_NUMBERS = (TypeError, ValueError, RuntimeError, OverflowError)
"""What torch raises of values that are no numbers of a list, or too large for any."""
_BESIDE_TOKENS = ("token_type_ids", "mm_token_type_ids")
"""Columns that have one number for each token."""


def read_ids(row: Mapping[str, Any], column: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a row's tokens, (tokens,) int64, and what the model is given beside them.

    Padding is left out of both, wherever it stands. Lists may be flat or a batch of one.

    Raises:
        Unusable: no token is left.
        InputError: an id that no vocabulary has, or a mask or list beside the tokens that has
            another length than they, or holds no numbers.
    """
    ids = _numbers(row[column], column)
    for wrong in ids[(ids < 0) | (ids > _HIGHEST)].tolist()[:1]:
        raise InputError(
            f"a row has the token id {wrong} in {column!r}: no vocabulary has that; give ids of "
            "the model's tokenizer"
        )
    extras = {
        name: _beside(row[name], name)
        for name in MODEL_INPUTS
        if name != column and row.get(name) is not None
    }
    mask = extras.pop("attention_mask", None)
    if mask is not None and "input_features" in extras and mask.numel() != len(ids):
        extras["attention_mask"] = mask  # it says where the sound ends
        mask = None
    kept = _kept(mask, len(ids), "attention_mask", column)
    for name in _BESIDE_TOKENS:
        if name in extras:
            # As in a batch of one, which is what the model is given.
            extras[name] = _same_length(extras[name], len(ids), name, column)[kept][None]
    hidden = extras.pop("decoder_attention_mask", None)
    if "decoder_input_ids" in extras:
        answer = extras["decoder_input_ids"].flatten()
        kept_answer = _kept(hidden, len(answer), "decoder_attention_mask", "decoder_input_ids")
        extras["decoder_input_ids"] = answer[kept_answer][None]
    ids = ids[kept]
    if not len(ids):
        raise Unusable("empty" if mask is None or not mask.numel() else "nothing but padding")
    if set(extras) == {"token_type_ids"} and not extras["token_type_ids"].any():
        extras = {}  # what models assume: a text and nothing else
    return ids, extras


def _numbers(value: Any, column: str) -> Tensor:
    try:
        return torch.tensor(value if value is not None else [], dtype=torch.int64).flatten()
    except _NO_NUMBERS as error:
        raise InputError(
            f"a row has no token ids in {column!r} ({first_line(error)}): choose another column "
            "with --text-column"
        ) from error


def _beside(value: Any, name: str) -> Tensor:
    try:
        return torch.tensor(value)
    except _NO_NUMBERS as error:
        raise InputError(
            f"a row has no numbers in {name!r} ({first_line(error)}): leave {name!r} out"
        ) from error


def _kept(mask: Tensor | None, length: int, name: str, column: str) -> Tensor:
    if mask is None:
        return torch.ones(length, dtype=torch.bool)
    return _same_length(mask, length, name, column) != 0


def _same_length(value: Tensor, length: int, name: str, column: str) -> Tensor:
    value = value.flatten()
    if len(value) != length:
        raise InputError(
            f"a row has {length} tokens in {column!r} and {len(value)} in {name!r}: give both the "
            f"same length, or leave {name!r} out"
        )
    return value
