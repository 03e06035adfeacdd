"""What a merge must have made of every tensor of a real model: AIM's formula, and ARM's turn."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from tests.support.merges import weights


def mean_magnitudes(base: Path, blocks: Tensor) -> dict[str, Tensor]:
    """Return mean |x| of what every weight reads on (blocks, length) ids, by the weight's name."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    sums: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        total = x.double().abs().flatten(0, -2).sum(0)
        sums[name] = sums.get(name, torch.zeros_like(total)) + total

    for name, module in model.model.named_modules(prefix="model"):
        if isinstance(module, nn.Linear) or "norm" in name:
            module.register_forward_pre_hook(
                lambda _, inputs, name=f"{name}.weight": record(name, inputs[0])
            )
    # The embeddings are tied: as lm_head, their matrix reads what the final norm writes.
    model.model.norm.register_forward_hook(
        lambda _, inputs, output: record("model.embed_tokens.weight", output)
    )
    with torch.inference_mode():
        for block in blocks:
            model.model(input_ids=block[None])
    return {name: total / blocks.numel() for name, total in sums.items()}


def assert_relaxed(
    base: Path, merged: dict[str, Tensor], aim: Path, omega: float, importance: dict[str, Tensor]
) -> None:
    """Check all tensors of ``aim``, a merge that without activations would be ``merged``."""
    before, found = weights(base), weights(aim)
    assert set(before) == set(merged) == set(found) == set(importance)
    for name, start in before.items():
        start, plain = start.double(), merged[name].double()
        keep = 1 - (1 - omega) * importance[name] / importance[name].max()
        wanted = start + (plain - start) * keep
        # An error in the update must not hide behind a weight that is much larger than it.
        tolerance = 1e-4 * float((plain - start).abs().max()) + 1e-7 * float(plain.abs().max())
        torch.testing.assert_close(
            found[name].double(), wanted, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
        relaxed = float((found[name] - merged[name]).abs().max())
        assert relaxed > 10 * tolerance, f"{name} was left as merged"


def assert_turned(
    before: dict[str, Tensor],
    straight: dict[str, Tensor],
    turned: dict[str, Tensor],
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    """Check that ``turned`` steps as far as ``straight`` in every row, and another way.

    Whatever is no projection steps alike, within ``rtol`` and ``atol``.
    """
    moved = 0
    for name, start in before.items():
        steps = [merged[name].double() - start.double() for merged in (straight, turned)]
        if name.endswith("_proj.weight"):
            # float32 weights hold few digits of a small step; whole rows still show its length.
            lengths = [step.norm(dim=1) for step in steps]
            torch.testing.assert_close(*lengths, rtol=2e-2, atol=1e-7, msg=name)
            # A little, where a single massive activation is all of the subspace.
            moved += int((steps[0] - steps[1]).norm() > 1e-3 * steps[0].norm())
        else:
            torch.testing.assert_close(*steps, rtol=rtol, atol=atol, msg=name)
    assert moved == 210
