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
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from mergekit.common import ModelReference, get_auto_cls
from safetensors import SafetensorError
from transformers import PreTrainedModel

from mergekit_arm.errors import InputError, first_line
from mergekit_arm.files import is_path
from mergekit_arm.machine import free_memory
from mergekit_arm.models.calling import set_up
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
            for part in (parsed.model, parsed.lora):
                if part and is_path(part.path) and not Path(part.path).is_dir():
                    raise InputError(f"model {reference}: {part.path} is no such directory")
            merged = parsed.merged(
                cache_dir=lora_cache or temporary, trust_remote_code=trust_remote_code
            )
            config = merged.config(trust_remote_code=trust_remote_code)
        except (
            OSError, ValueError, RuntimeError, HFValidationError, StrictDataclassError
        ) as error:  # fmt: skip
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
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise InputError(
            f"model {source.reference}: its weights have other shapes than config.json asks for "
            "(they are listed above); copy or download both again"
        ) from error
    # A head that the checkpoint lacks changes nothing that is measured.
    absent = [key for key in report["missing_keys"] if not _of_the_head(model, key)]
    if absent:
        raise InputError(
            f"model {source.reference} lacks {len(absent)} weights of a {type(model).__name__}, "
            f"first {min(absent)}; transformers would make them up: complete the checkpoint"
        )
    model = set_up(model)
    return model if placement else model.to(device)


def _of_the_head(model: PreTrainedModel, parameter: str) -> bool:
    base = model.base_model_prefix
    return model.base_model is not model and not parameter.startswith(f"{base}.")


def model_class(source: Source) -> Any:
    """Return the class that ``config.json`` names, or transformers' choice for remote code."""
    architecture = source.config.architectures[0]
    named = getattr(transformers, architecture, None)
    # mergekit's choice of an automatic class is a guess where the name is unusual.
    if named is not None and named.config_class is type(source.config):
        return named
    return get_auto_cls(architecture)


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
    return set_up(model)


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
