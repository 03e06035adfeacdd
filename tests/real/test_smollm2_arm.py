"""ARM on a real 135 M-parameter Llama: subspaces against exact ones, and one step of the stream."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from mergekit_arm.demo.text import DomainText
from mergekit_arm.demo.train import token_blocks
from mergekit_arm.judging.heldout import whole_text
from mergekit_arm.judging.loss import mean_loss
from mergekit_arm.statistics.kinds.second_moment import default_rank, stored_directions
from mergekit_arm.statistics.kinds.subspace import SUBSPACE, Subspace, SubspaceSketch
from mergekit_arm.statistics.read import Statistics
from tests.real.commands import call, merge
from tests.real.formula import assert_turned
from tests.real.smollm2 import EVERY, LENGTH, capital_of_france
from tests.support.merges import weights

pytestmark = [pytest.mark.real, pytest.mark.long]

BLOCKS = 16
RATE = 0.7
LAYERS = range(0, 30, 15)
"""Those whose subspaces are compared: exact ones take seconds each."""
KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
Report = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def blocks(base: Path, corpora: dict[str, DomainText]) -> Tensor:
    """Calibration tokens: real text, (blocks, length)."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    return token_blocks(tokenizer, corpora["general"].train, LENGTH)[:BLOCKS]


@pytest.fixture(scope="module")
def statistics(base: Path, blocks: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    rows = [json.dumps({"input_ids": block.tolist()}) + "\n" for block in blocks]
    (folder / "tokens.jsonl").write_text("".join(rows))
    call(
        "mergekit-arm", "calibrate", base, folder / "stats",
        "--dataset", folder / "tokens.jsonl", "--dtype", "float32",
    )  # fmt: skip
    return folder / "stats"


def layer_of(name: str) -> int:
    """Return the number of the layer that a module of ``model.layers`` belongs to."""
    return int(name.split(".")[2])


@pytest.fixture(scope="module")
def second_moments(base: Path, blocks: Tensor) -> dict[str, Tensor]:
    """XᵀX of what every matrix of ``LAYERS`` reads, recorded here in full."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    moments: dict[str, Tensor] = {}

    def record(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        moments[name] = moments.get(name, torch.zeros(rows.shape[1], rows.shape[1])) + rows.T @ rows

    for name, module in model.named_modules():
        if name.endswith(KINDS) and layer_of(name) in LAYERS:
            module.register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs[0]))
    with torch.inference_mode():
        for block in blocks:
            model.model(input_ids=block[None])
    return moments


def test_subspaces_hold_what_the_best_ones_would(
    statistics: Path, second_moments: dict[str, Tensor], capsys: Report
) -> None:
    opened = Statistics("stats", statistics)
    held: dict[str, list[float]] = {kind: [] for kind in KINDS}
    angles: dict[str, list[float]] = {kind: [] for kind in KINDS}
    sizes: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for name, moment in second_moments.items():
        kind = next(kind for kind in KINDS if name.endswith(kind))
        record = opened.metadata.weights[f"{name}.weight"]
        basis = SUBSPACE.basis(opened, record, 0.9)
        assert basis is not None
        basis, moment = basis.double(), moment.double()
        k = basis.shape[1]
        values, vectors = torch.linalg.eigh(moment)
        best = float(values[-k:].sum())
        held[kind].append(float(((moment @ basis) * basis).sum()) / best)
        width = len(basis)
        if k < stored_directions(width, default_rank(width)):
            assert float(((moment @ basis) * basis).sum()) >= 0.899 * float(moment.trace())
        # The cosines between the leading halves: the last dimensions of either are arbitrary.
        half = max(1, k // 2)
        cosines = torch.linalg.svdvals(vectors[:, -half:].T @ basis)
        angles[kind].append(float(cosines.clamp(max=1).acos().rad2deg().max()))
        sizes[kind].append(k)
    with capsys.disabled():
        sys.stdout.write(
            f"\nsubspaces of energy 0.9 against exact ones, worst of {len(LAYERS)} layers\n"
        )
        for kind in KINDS:
            sys.stdout.write(
                f"  {kind:18} k {min(sizes[kind])}–{max(sizes[kind])}   captured energy "
                f"{min(held[kind]):.4f} of the optimum   largest principal angle of the leading "
                f"half {max(angles[kind]):.2f}°\n"
            )
    assert min(min(values) for values in held.values()) >= 0.99


def test_sketches_hold_what_the_best_subspaces_would(
    base: Path, blocks: Tensor, second_moments: dict[str, Tensor], capsys: Report
) -> None:
    """At the default rank SmolLM2's second moments are whole; wider models' are sketched."""
    width, rank = 1536, 512
    observers: dict[str, SubspaceSketch] = {}
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, module in model.named_modules():
        if name.endswith("mlp.down_proj") and layer_of(name) in LAYERS:
            observers[name] = Subspace(rank=rank, energy=1.0).observer(width, torch.device("cpu"))
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: observers[name].update(inputs[0].flatten(0, -2))
            )
    with torch.inference_mode():
        for block in blocks:
            model.model(input_ids=block[None])
    held = []
    for name, observer in observers.items():
        basis, moment = observer.dominant().basis, second_moments[name].double()
        k = basis.shape[1]
        best = float(torch.linalg.eigvalsh(moment)[-k:].sum())
        held.append(float(((moment @ basis) * basis).sum()) / best)
        assert k <= stored_directions(width, rank) == 128
    with capsys.disabled():
        sys.stdout.write(
            f"\nsketches of {rank} of {width} columns: captured energy {min(held):.4f} of the "
            f"optimum, worst of {len(LAYERS)} layers\n"
        )
    assert min(held) >= 0.99


def test_statistics_are_small(base: Path, statistics: Path, capsys: Report) -> None:
    size = sum(file.stat().st_size for file in statistics.iterdir())
    checkpoint = (base / "model.safetensors").stat().st_size
    with capsys.disabled():
        sys.stdout.write(f"\nstatistics: {size / checkpoint:.1%} of the bfloat16 checkpoint\n")
    assert size <= 0.15 * checkpoint


@pytest.fixture(scope="module")
def merges(
    base: Path,
    run: Callable[[str], Path],
    statistics: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("arm-merges")
    early = run("prose") / f"checkpoint-{EVERY}"

    def config(method: str, own: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
        return {
            "merge_method": method,
            "base_model": str(base),
            "models": [{"model": str(early), "parameters": own}],
            "parameters": shared,
            "dtype": "float32",
        }

    stats = {"activation_stats": str(statistics)}
    merge(config("task_arithmetic", {"weight": RATE}, {}), folder / "task_arithmetic")
    merge(config("arm", {"learning_rate": RATE}, {**stats, "rotation": 0.0}), folder / "arm_linear")
    merge(config("arm", {"learning_rate": RATE}, {**stats, "rotation": -0.4}), folder / "arm")
    return {
        "checkpoint": early,
        **{name: folder / name for name in ("task_arithmetic", "arm_linear", "arm")},
    }


def test_without_rotation_every_tensor_is_task_arithmetic(merges: dict[str, Path]) -> None:
    plain, stepped = weights(merges["task_arithmetic"]), weights(merges["arm_linear"])
    assert set(plain) == set(stepped)
    for name, tensor in plain.items():
        torch.testing.assert_close(stepped[name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_a_step_turns_every_matrix_and_keeps_its_length(
    base: Path, merges: dict[str, Path]
) -> None:
    assert_turned(*(weights(merges.get(name, base)) for name in ("", "arm_linear", "arm")))


def test_the_step_loads_speaks_and_is_compared(
    base: Path, merges: dict[str, Path], corpora: dict[str, DomainText], capsys: Report
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    heldout = {
        domain: token_blocks(tokenizer, corpora[domain].heldout, LENGTH)[:8]
        for domain in ("prose", "general")
    }
    losses: dict[str, dict[str, float]] = {}
    for name, folder in {"base": base, **merges}.items():
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        losses[name] = {
            domain: mean_loss(model, whole_text(ids), 2) for domain, ids in heldout.items()
        }
    with capsys.disabled():
        sys.stdout.write(f"\nheld-out loss after one step (η = {RATE}), nats per token\n")
        for name, row in losses.items():
            values = "  ".join(f"{domain} {loss:.4f}" for domain, loss in row.items())
            sys.stdout.write(f"  {name:16} {values}\n")
    assert "Paris" in capital_of_france(model, tokenizer)
    assert losses["arm"]["prose"] < losses["base"]["prose"]
