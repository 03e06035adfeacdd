"""How a loaded model is called: set up so that every product shows, and with which arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_arm.errors import InputError


def set_up(model: PreTrainedModel) -> PreTrainedModel:
    """Set a model up for forward passes whose every product can be seen."""
    for module in model.modules():  # a model of images and text is made of several
        if isinstance(module, PreTrainedModel):
            module.config.use_cache = False
    if any(hasattr(module, "is_transposed") for module in model.modules()):
        # Fused kernels hide which token goes to which expert; written out, every product shows.
        model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


def token_counts(
    model: PreTrainedModel, length: int, extra: Mapping[str, Tensor]
) -> tuple[int, ...]:
    """Return how many tokens the parts of ``model`` read of a sequence of ``length``.

    One number, or two of an encoder–decoder; see ``model_arguments``.
    """
    if not model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        return (length,)
    if "decoder_input_ids" in extra:
        return length, extra["decoder_input_ids"].shape[-1]
    return length // 2, length - length // 2


def model_arguments(
    model: PreTrainedModel, ids: Tensor, extra: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Return what ``model`` is called with for token ids (sequences, length), on their device.

    An encoder–decoder reads the first half of every sequence in its encoder, and its decoder
    the second: text that continues what the encoder has read. ``extra`` holds images or audio
    as the model's processor made them, and may hold ``decoder_input_ids``.

    Raises:
        InputError: the model needs something that the data has not.
    """
    given = {
        name: value.to(ids.device, model.dtype if value.is_floating_point() else value.dtype)
        for name, value in extra.items()
    }
    if model.main_input_name not in ("input_ids", *given):
        raise InputError(
            f"{type(model).__name__} reads {model.main_input_name}, and the data has none: give "
            f"rows with the columns {model.main_input_name} and input_ids, made by its processor"
        )
    if not model.config.is_encoder_decoder:
        multiple_choice = type(model).__name__.endswith("ForMultipleChoice")
        return {"input_ids": ids[:, None] if multiple_choice else ids, **given}
    if model.main_input_name != "input_ids":
        return {"decoder_input_ids": ids, **given}
    if "decoder_input_ids" in given:
        return {"input_ids": ids, **given}
    half = ids.shape[1] // 2
    if half == 0:
        raise InputError("an encoder–decoder model needs sequences of at least two tokens")
    start = model.config.decoder_start_token_id
    first = ids.new_full((len(ids), 1), start if start is not None else model.config.pad_token_id)
    return {
        "input_ids": ids[:, :half],
        "decoder_input_ids": torch.cat([first, ids[:, half:-1]], dim=1),
        **given,
    }
