"""Find and load the model to measure, by mergekit's reference grammar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import HFValidationError
from mergekit.common import ModelReference, get_auto_cls
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.machine import free_memory
from mergekit_arm.units import size_text

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Source:
    """A model that has been found, but not loaded."""

    reference: str
    """As the user wrote it."""
    name: str
    """What transformers loads: a directory or a Hub id (an adapter is merged already)."""
    revision: str | None
    config: Any
    trust_remote_code: bool

    @property
    def commit(self) -> str | None:
        """Commit hash of a Hub model, None for a local one."""
        if Path(self.name).is_dir():
            return None
        # transformers no longer keeps the hash; the cache lays files out by commit.
        cached = huggingface_hub.try_to_load_from_cache(
            self.name, "config.json", revision=self.revision
        )
        return Path(cached).parent.name if isinstance(cached, str) else None


@contextmanager
def find_model(
    reference: str, *, trust_remote_code: bool = False, lora_cache: str | None = None
) -> Iterator[Source]:
    """Resolve ``path``, ``id``, ``id@revision`` or ``model+lora`` and read its configuration.

    An adapter is merged by mergekit's own code, so that the measured weights are the ones a
    merge will see; the result goes to ``lora_cache``, or to a temporary directory for the
    duration of the context.

    Raises:
        InputError: not a model, not reachable, quantised, or in need of code not allowed.
    """
    with TemporaryDirectory(prefix="mergekit-arm-lora-") as temporary:
        try:
            parsed = ModelReference.parse(reference)
            merged = parsed.merged(
                cache_dir=lora_cache or temporary, trust_remote_code=trust_remote_code
            )
            config = merged.config(trust_remote_code=trust_remote_code)
        except (OSError, ValueError, RuntimeError, HFValidationError) as error:
            raise InputError(unloadable(reference, error)) from error
        if getattr(config, "quantization_config", None):
            raise InputError(
                f"{reference} is quantised, and mergekit merges no quantised weights; "
                "calibrate the full-precision model it was made from"
            )
        if len(config.architectures or ()) != 1:
            raise InputError(
                f"model {reference}: config.json must name one architecture, it has "
                f"{config.architectures}; mergekit asks for the same"
            )
        yield Source(reference, merged.model.path, merged.model.revision, config, trust_remote_code)


def load_tokenizer(source: Source) -> transformers.PreTrainedTokenizerBase | None:
    """Return the model's tokenizer, or None where it has none."""
    try:
        return AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        # transformers has no one error for "no tokenizer files here".
        return None


def choose_device(name: str) -> torch.device:
    """Return the device that ``auto`` or an explicit name means.

    Raises:
        InputError: unknown, or not on this machine.
    """
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} cannot be used here: {first_line(error)}") from error
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for the forward passes; ``auto`` is the fastest safe one.

    bfloat16 on accelerators that have it and on CPUs with AMX tiles; float32 elsewhere (a CPU
    without AMX is up to twice as slow in bfloat16). Never float16, which overflows on models
    with massive activations.
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cpu":
        amx = torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if amx else torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float32
    return torch.bfloat16


def load_model(
    source: Source,
    device: torch.device,
    dtype: torch.dtype,
    placement: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load the model for forward passes: evaluation mode, no cache, no gradients.

    Holds all weights in ``dtype`` on ``device``, or where ``placement`` puts them.

    Raises:
        InputError: transformers cannot load it, or only with random numbers
            for weights that the checkpoint lacks.
    """
    loader = model_class(source)
    remote = {"trust_remote_code": True} if source.trust_remote_code else {}
    model: PreTrainedModel
    try:
        model, report = loader.from_pretrained(
            source.name,
            revision=source.revision,
            config=source.config,
            dtype=dtype,
            output_loading_info=True,
            **remote,
            **(placement or {}),
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise InputError(unloadable(source.reference, error)) from error
    # A head that the checkpoint lacks changes nothing that is measured.
    absent = [key for key in report["missing_keys"] if not _of_the_head(model, key)]
    if absent:
        raise InputError(
            f"model {source.reference} lacks {len(absent)} weights of a {type(model).__name__}, "
            f"first {min(absent)}; transformers would make them up: complete the checkpoint"
        )
    model = prepare(model)
    return model if placement else model.to(device)


def _of_the_head(model: PreTrainedModel, parameter: str) -> bool:
    base = model.base_model_prefix
    return model.base_model is not model and not parameter.startswith(f"{base}.")


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Set a model up for forward passes whose every product can be seen."""
    model.config.use_cache = False
    if any(hasattr(module, "is_transposed") for module in model.modules()):
        # Fused kernels hide which token goes to which expert; written out, every product shows.
        model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


def model_class(source: Source) -> Any:
    """Return the class that ``config.json`` names, or transformers' choice for remote code."""
    architecture = source.config.architectures[0]
    named = getattr(transformers, architecture, None)
    # mergekit's choice of an automatic class is a guess where the name is unusual.
    if named is not None and named.config_class is type(source.config):
        return named
    return get_auto_cls(architecture)


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


def open_checkpoint(source: Source) -> LazyTensorLoader:
    """Open the model's checkpoint as mergekit does, lazily.

    Raises:
        InputError: no checkpoint file that mergekit can read.
    """
    try:
        local = source.name
        if not Path(local).is_dir():
            # transformers has fetched the weights already; mergekit's own download would list
            # the repository first, which fails offline even where everything is cached.
            local = huggingface_hub.snapshot_download(
                local, revision=source.commit or source.revision, local_files_only=True
            )
        return LazyTensorLoader.from_disk(local)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(unloadable(source.reference, error)) from error


def unloadable(reference: str, error: BaseException) -> str:
    """Return what to tell the user of an error that came while finding or loading a model."""
    if "trust_remote_code" in str(error):
        return (
            f"model {reference} brings code of its own, which is not run unasked: "
            "read it, and add --trust-remote-code"
        )
    return (
        f"model {reference}: {first_line(error)} "
        "(expected a local directory, a Hub id, id@revision or model+lora)"
    )


def empty_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model without its weights, which take no memory; buffers are real.

    Raises:
        InputError: transformers cannot make it.
    """
    try:
        with init_empty_weights(include_buffers=False):
            loader = model_class(source)
            model: PreTrainedModel = (
                loader._from_config(source.config, dtype=dtype)
                if issubclass(loader, PreTrainedModel)
                else loader.from_config(
                    source.config, dtype=dtype, trust_remote_code=source.trust_remote_code
                )
            )
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise InputError(unloadable(source.reference, error)) from error
    model.tie_weights()  # what was tied has become separate on the way
    return prepare(model)


def check_weights_fit(
    size: int, device: torch.device, dtype: torch.dtype, model: str, processes: int
) -> None:
    """Refuse to load weights of ``size`` bytes, once for each of ``processes``, into what is free.

    Raises:
        InputError: with the options that help.
    """
    free = free_memory(device)
    if size * processes > free:
        times = f", in each of {processes} processes" if processes > 1 else ""
        name = str(dtype).removeprefix("torch.")
        narrower = "" if dtype.itemsize < 4 else ", --dtype bfloat16"
        raise InputError(
            f"{model} takes {size_text(size)} in {name}{times}, and {size_text(free)} are free on "
            f"{device}: use --low-memory, --device-map auto{narrower}"
        )


def load_own_tokenizer(reference: str, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    """Return a model's tokenizer, an adapter's own before its base's; None where there is none."""
    parsed = ModelReference.parse(reference)
    # A trainer saves the tokenizer beside the adapter.
    for part in (parsed.lora, parsed.model):
        if part is not None:
            source = Source(reference, part.path, part.revision, None, trust_remote_code)
            tokenizer = load_tokenizer(source)
            if tokenizer is not None:
                return tokenizer
    return None
