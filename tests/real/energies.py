"""How much of the second moment should a subspace hold? ``python -m tests.real.energies``

One ARM step of SmolLM2-135M towards a short fine-tune on prose, with exact subspaces of several
energies: held-out loss on the task (prose) and on general text, beside task arithmetic.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from mergekit_arm.demo.text import standard_library
from mergekit_arm.demo.train import token_blocks, train
from mergekit_arm.judging.heldout import whole_text
from mergekit_arm.judging.loss import mean_loss
from mergekit_arm.methods.step import Incoming, arm_step
from mergekit_arm.statistics.kinds.second_moment import (
    Dominant,
    columns_for_energy,
    dominant_subspace,
    orthonormal,
)
from mergekit_arm.statistics.kinds.subspace import Subspace, SubspaceSketch
from tests.real.smollm2 import smollm2

ENERGIES = (0.5, 0.8, 0.9, 0.97)
RATES = (0.7, 1.0)
ROTATIONS = (-0.4, -0.7)
LENGTH = 128
STEPS = 16
SITES = ("q_proj", "o_proj", "gate_proj", "down_proj")
READERS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Layers that read another one's input."""


def observe(model: LlamaForCausalLM, blocks: Tensor) -> dict[str, SubspaceSketch]:
    """Return the whole second moment of every layer's input."""
    observers: dict[str, SubspaceSketch] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(SITES):
            width = module.in_features
            observers[name] = Subspace(rank=width).observer(width, torch.device("cpu"))
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, inputs, name=name: observers[name].update(inputs[0].flatten(0, -2))
                )
            )
    with torch.inference_mode():
        for block in blocks:
            model.model(input_ids=block[None])
    for handle in handles:
        handle.remove()
    return observers


def spectrum(observer: SubspaceSketch) -> Dominant:
    """Return the leading eigenvectors that hold the largest of ``ENERGIES``."""
    return dominant_subspace(
        observer.sums["sketch"],
        None,
        float(observer.sums["square_norm"]),
        int(observer.sums["subspace_tokens"]),
        energy=max(ENERGIES),
        most=observer.sums["sketch"].shape[0],
    )


def bases(spectra: dict[str, Dominant], energy: float) -> dict[str, Tensor]:
    """Return the fewest leading eigenvectors that hold ``energy``, by layer."""
    found = {}
    for name, one in spectra.items():
        count = columns_for_energy(
            one.eigenvalues, one.trace, energy, measured=max(ENERGIES), where=name
        )
        found[name] = orthonormal(one.basis[:, :count].bfloat16())
    return found


def step(
    base: LlamaForCausalLM,
    tuned: dict[str, Tensor],
    found: dict[str, Tensor],
    rate: float,
    rotation: float,
) -> LlamaForCausalLM:
    """Return ``base`` after one step towards ``tuned``."""
    merged = copy.deepcopy(base)
    for name, parameter in merged.named_parameters():
        layer = name.removesuffix(".weight")
        for reader, site in READERS.items():
            layer = layer.replace(reader, site)
        parameter.data = arm_step(
            parameter.data, [Incoming(tuned[name], rate)], found.get(layer), rotation=rotation
        )
    return merged


def rows() -> Iterator[tuple[str, LlamaForCausalLM, dict[str, Tensor]]]:
    """Yield a label, a model, and the held-out text."""
    corpora = standard_library(characters=200_000)
    folder = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held = {
        d: token_blocks(tokenizer, corpora[d].heldout, LENGTH)[:24] for d in ("prose", "general")
    }
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    yield "base", base, held
    model = copy.deepcopy(base)
    blocks = token_blocks(tokenizer, corpora["prose"].train, LENGTH)
    train(model, tokenizer, blocks, steps=STEPS, learning_rate=2e-4, batch_size=1)
    yield "fine-tune", model, held
    tuned = dict(model.state_dict())
    observers = observe(base, token_blocks(tokenizer, corpora["general"].train, LENGTH)[:16])
    for rate in RATES:
        yield f"task arithmetic, η {rate}", step(base, tuned, {}, rate, 0.0), held
    spectra = {name: spectrum(observer) for name, observer in observers.items()}
    for energy in ENERGIES:
        found = bases(spectra, energy)
        mean = sum(basis.shape[1] for basis in found.values()) / len(found)
        for rate in RATES:
            for rotation in ROTATIONS:
                label = f"ρ {rotation}, η {rate}, energy {energy} (k {mean:.0f} on average)"
                yield label, step(base, tuned, found, rate, rotation), held


if __name__ == "__main__":
    for label, model, held in rows():
        losses = "  ".join(
            f"{name} {mean_loss(model, whole_text(ids), 4):.4f}" for name, ids in held.items()
        )
        sys.stdout.write(f"{label:50} {losses}\n")
        sys.stdout.flush()
