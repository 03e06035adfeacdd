"""Calibration layer by layer: the same statistics, each weight read once, bounded memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from mergekit_arm.calibration.layerwise.followers import Followers
from mergekit_arm.calibration.layerwise.hidden import HiddenStates
from mergekit_arm.calibration.running.progress import SavedProgress
from mergekit_arm.errors import InputError
from mergekit_arm.models.tensors import CheckpointTensors
from tests.support.equality import assert_same_statistics
from tests.support.models import VOCABULARY, tiny_llama

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALTERNATING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 8},
    "gemma2": {**ALTERNATING, "query_pre_attn_scalar": 8},
    "gemma3_text": ALTERNATING,  # two rotary tables, two masks
    "cohere2": ALTERNATING,
    "phi3": {},
    "olmo2": {},
    "glm4": {},
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},  # projections before and behind the layers
    "bloom": {"n_layer": 3, "n_head": 4},  # a norm before the layers
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "expansion_ratio": 2},
    "bert": {"is_decoder": True},
}


def save_tiny(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**{**SIZES, **ARCHITECTURES[name]})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)


def sums(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_statistics_are_the_same(
    name: str, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    """Not only close: the same operations on the same numbers give the same bytes."""
    save_tiny(name, tmp_path / "model")
    whole = measure(tmp_path / "model", tmp_path / "whole", batch_size=5)
    walked = measure(tmp_path / "model", tmp_path / "walked", batch_size=5, low_memory=True)
    assert_same_statistics(walked, whole)
    assert sums(walked) == sums(whole)
    assert not (tmp_path / "walked.partial").exists()


def test_each_weight_is_read_once(
    family: Path, tmp_path: Path, measure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And for its values: a probe reads 32 of them."""
    read: Counter[str] = Counter()
    plain = CheckpointTensors.get

    def counting(self: CheckpointTensors, name: str) -> Tensor:
        read[name] += 1
        return plain(self, name)

    monkeypatch.setattr(CheckpointTensors, "get", counting)
    probed = Counter(load_file(family / "base" / "model.safetensors").keys())
    measure(family / "base", tmp_path / "stats", low_memory=True, batch_size=2)
    read.subtract(probed)
    assert set(read.values()) == {0, 1}
    # The output head never runs, so that it is not read at all.
    assert [name for name, count in read.items() if count == 0] == ["lm_head.weight"]


def test_only_one_layer_is_held_at_a_time(
    family: Path, tmp_path: Path, measure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[set[str]] = []
    plain = Followers.through_layer

    def looking(self: Followers, *rest: Any) -> None:
        model: PreTrainedModel = self._chain.model
        held.append({name for name, p in model.named_parameters() if not p.is_meta})
        plain(self, *rest)

    monkeypatch.setattr(Followers, "through_layer", looking)
    measure(family / "base", tmp_path / "stats", low_memory=True, batch_size=4)
    assert {name.split(".")[2] for name in held[0]} == {"0"}
    assert {name.split(".")[2] for name in held[-1]} == {"1"}


@pytest.mark.parametrize("budget", ["0", "20KB"])
def test_hidden_states_beyond_the_budget_are_on_the_disk(
    budget: str,
    family: Path,
    tmp_path: Path,
    measure: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = 0
    plain = HiddenStates.put

    def looking(self: HiddenStates, *rest: Any) -> None:
        nonlocal most
        plain(self, *rest)
        most = max(most, sum(states.nbytes for states in self._held.values()))

    monkeypatch.setattr(HiddenStates, "put", looking)
    measure(
        family / "base",
        tmp_path / "stats",
        low_memory=True,
        batch_size=2,
        activation_budget=budget,
    )
    measure(family / "base", tmp_path / "whole", batch_size=2)
    assert most <= {"0": 0, "20KB": 20_000}[budget]
    assert (most > 0) is (budget != "0")
    assert sums(tmp_path / "stats") == sums(tmp_path / "whole")


def test_files_that_saved_progress_needs_stay(tmp_path: Path) -> None:
    states = HiddenStates(SavedProgress(tmp_path / "out.partial", {}, every=0), budget=0)
    states.put(("a", 0), torch.ones(3))
    states.persist([("a", 0)])
    states.settle([("a", 0)])
    states.put(("a", 1), torch.zeros(3))
    states.drop(("a", 0))
    assert torch.equal(states.get(("a", 0)), torch.ones(3))
    states.persist([("a", 1)])
    states.settle([("a", 1)])
    assert [path.name for path in (tmp_path / "out.partial").iterdir()] == [
        "process-0.hidden.a.1.safetensors"
    ]


def test_weights_in_one_file_of_torch(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    torch.save(load_file(family / "base" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((family / "base" / "config.json").read_text())
    measure(tmp_path, tmp_path / "stats", low_memory=True)
    assert sums(tmp_path / "stats") == sums(family / "stats")


def with_a_skip(self: LlamaModel, input_ids: Tensor, **_: Any) -> Any:
    """A forward that adds the first layer's output to what the last one takes."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    hidden = self.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])[None]
    rotary = self.rotary_emb(hidden, position_ids=positions)
    first = None
    for number, layer in enumerate(self.layers):
        if number == len(self.layers) - 1:
            hidden = hidden + first
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        first = hidden if first is None else first
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def backwards(self: LlamaModel, input_ids: Tensor, **_: Any) -> Any:
    """A forward that calls its layers from the last to the first."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    hidden = self.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])[None]
    rotary = self.rotary_emb(hidden, position_ids=positions)
    for layer in reversed(self.layers):
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def scaled_by_the_mean(self: LlamaModel, input_ids: Tensor, **_: Any) -> Any:
    """A forward whose layers take an argument that was made from the hidden states."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    hidden = self.embed_tokens(input_ids)
    positions = torch.arange(input_ids.shape[1])[None]
    for layer in self.layers:
        rotary = self.rotary_emb(hidden, position_ids=positions)
        rotary = tuple(table * (1 + hidden.mean()) for table in rotary)
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


def remembering() -> Callable[..., Any]:
    """A layer's forward that adds what the layer before it took, which no argument shows."""
    plain = LlamaDecoderLayer.forward
    memory: dict[tuple[int, ...], Tensor] = {}

    def forward(self: LlamaDecoderLayer, hidden_states: Tensor, **rest: Any) -> Any:
        shape = tuple(hidden_states.shape)
        before = memory.get(shape) if self.self_attn.layer_idx else None
        memory[shape] = hidden_states
        return plain(self, hidden_states if before is None else hidden_states + before, **rest)

    return forward


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (with_a_skip, "takes more than what the one before it returns"),
        (backwards, "not called one after the other"),
        (scaled_by_the_mean, "takes as position_embeddings depends on other layers"),
        (None, "depends on what other layers did"),
    ],
)
def test_what_is_no_chain_is_offloaded(
    forward: Any,
    reason: str,
    tmp_path: Path,
    token_file: Path,
    measure: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of these would be measured wrongly if its forward were believed to be a chain."""
    # Tied weights on the disk are what older releases of accelerate and transformers confuse.
    tied = forward is backwards
    tiny_llama(0, layers=4, tied=tied).save_pretrained(tmp_path / "model")
    if forward is None:
        monkeypatch.setattr(LlamaDecoderLayer, "forward", remembering())
    else:
        monkeypatch.setattr(LlamaModel, "forward", forward)
    notes: list[str] = []
    options = CalibrationOptions(
        model=str(tmp_path / "model"),
        out=str(tmp_path / "stats"),
        dataset=str(token_file),
        batch_size=4,
        low_memory=True,
    )
    calibrate(options, say=notes.append)
    (note,) = (note for note in notes if "cannot be walked" in note)
    assert reason in note
    assert "accelerate's offload" in note
    measure(tmp_path / "model", tmp_path / "whole", batch_size=4)
    assert_same_statistics(tmp_path / "stats", tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "stats", "whole"]


def test_nothing_is_loaded_that_is_offloaded(
    tmp_path: Path, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_llama(0, layers=3).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(LlamaModel, "forward", backwards)
    held: list[int] = []
    plain = LlamaForCausalLM.forward

    def looking(self: LlamaForCausalLM, *args: Any, **rest: Any) -> Any:
        held.append(sum(p.numel() for p in self.parameters() if not p.is_meta))
        return plain(self, *args, **rest)

    monkeypatch.setattr(LlamaForCausalLM, "forward", looking)
    calibrate(
        CalibrationOptions(
            model=str(tmp_path / "model"),
            out=str(tmp_path / "stats"),
            dataset=str(token_file),
            low_memory=True,
        )
    )
    walk, *offloaded = held
    assert walk == VOCABULARY * 32  # what is tried first reads the embedding table
    assert offloaded
    assert set(offloaded) == {0}


def test_a_weight_that_the_checkpoint_lacks_is_not_made_up(
    family: Path, tmp_path: Path, token_file: Path
) -> None:
    weights = load_file(family / "base" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((family / "base" / "config.json").read_text())
    notes: list[str] = []
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        calibrate(
            CalibrationOptions(
                model=str(tmp_path),
                out=str(tmp_path / "stats"),
                dataset=str(token_file),
                low_memory=True,
            ),
            say=notes.append,
        )


def test_options_that_exclude_each_other(tmp_path: Path, family: Path) -> None:
    def attempt(**options: Any) -> None:
        options["dataset"] = "./nothing.jsonl"  # options are looked at before data
        calibrate(CalibrationOptions(str(family / "base"), str(tmp_path / "s"), **options))

    with pytest.raises(InputError, match="exclude each other"):
        attempt(low_memory=True, device_map="auto")
    with pytest.raises(InputError, match="leave --device out"):
        attempt(device="cpu", device_map="auto")
    with pytest.raises(InputError, match="belongs to --low-memory"):
        attempt(activation_budget="1GB")
    with pytest.raises(InputError, match="no size"):
        attempt(low_memory=True, activation_budget="much")


def test_a_device_map(family: Path, tmp_path: Path, measure: Callable[..., Path]) -> None:
    measure(family / "base", tmp_path / "stats", device_map="auto")
    assert sums(tmp_path / "stats") == sums(family / "stats")


def test_a_device_map_that_needs_the_disk(
    family: Path, tmp_path: Path, measure: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_arm.calibration import prepare as run

    size = (family / "base" / "model.safetensors").stat().st_size
    plain = run.spread

    def cramped(*arguments: Any) -> dict[str, Any]:
        return {**plain(*arguments), "max_memory": {"cpu": size // 2}}

    monkeypatch.setattr(run, "spread", cramped)
    measure(family / "base", tmp_path / "stats", device_map="auto")
    assert sums(tmp_path / "stats") == sums(family / "stats")
    record = json.loads((tmp_path / "stats" / "activation_stats.json").read_text())
    assert record["settings"]["device"] == "cpu"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stats"]
