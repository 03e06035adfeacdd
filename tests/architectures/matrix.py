"""One architecture from start to end: publish, calibrate, measure independently, merge, compare."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.common import ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader
from mergekit.io.tasks import LoadTensor
from mergekit.scripts.run_yaml import main as mergekit_yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_arm.calibration.calibrate import CalibrationOptions, calibrate
from mergekit_arm.models.calling import model_arguments
from mergekit_arm.statistics.format import LEFT_AS_MERGED, NOT_LOADED, Metadata
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics
from tests.architectures.recorder import Recorder
from tests.architectures.zoo import Architecture, build

OMEGA = 0.4
WEIGHT = 0.7
SEQUENCES, LENGTH = 4, 24


@dataclass(frozen=True)
class Outcome:
    """What a line of the table says."""

    metadata: Metadata
    merged: bool


def run(architecture: Architecture, folder: Path) -> Outcome:
    """Take one architecture through everything; fails where a number is off."""
    base, other = publish(architecture, folder)
    rows = write_rows(architecture, folder / "rows.jsonl")
    calibrate(
        CalibrationOptions(
            model=str(base),
            out=str(folder / "stats"),
            dataset=str(folder / "rows.jsonl"),
            min_expert_tokens=1,
            dtype="float32",
        )
    )
    statistics = Statistics("stats", folder / "stats")
    tensors = load_file(base / "model.safetensors")
    check_coverage(statistics, tensors)
    names = merge(architecture, base, other, statistics, folder)
    asked = {name: load(base, name) for name in names or () if name not in tensors}
    recorder = Recorder(tensors | asked)
    model = load_plain(architecture, base)
    with torch.no_grad(), recorder:
        for row in rows:
            extra = {n: torch.tensor(v) for n, v in row.items() if n != "input_ids"}
            model(**model_arguments(model, torch.tensor([row["input_ids"]]), extra))
    for name, tensor in (tensors | asked).items():
        check_sums(name, tensor, statistics, recorder)
    if names is not None:
        for name, merged in names.items():
            check_formula(name, merged, load(base, name), load(other, name), statistics, recorder)
    return Outcome(statistics.metadata, names is not None)


def publish(architecture: Architecture, folder: Path) -> tuple[Path, Path]:
    """Write a base model and a fine-tune of it as published checkpoints are laid out."""
    paths = []
    for number in (0, 1):
        path = folder / ("base", "other")[number]
        model = build(architecture)
        if number:
            torch.manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        model.save_pretrained(path)
        tensors = architecture.publish(load_file(path / "model.safetensors"))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        config["architectures"] = [architecture.model]
        (path / "config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths[0], paths[1]


def write_rows(architecture: Architecture, path: Path) -> list[dict[str, object]]:
    """Write rows of token ids, with whatever else the model reads."""
    torch.manual_seed(7)
    rows: list[dict[str, object]] = []
    for _ in range(SEQUENCES):
        ids = [*architecture.image, *torch.randint(3, 90, (LENGTH,)).tolist()]
        rows.append({"input_ids": ids, **architecture.extra(ids)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def check_coverage(statistics: Statistics, tensors: dict[str, Tensor]) -> None:
    """Every tensor of the checkpoint is measured or listed, and nothing else."""
    weights = statistics.metadata.weights
    assert set(weights) == set(tensors)
    for name, record in weights.items():
        assert (record.site is None) is (record.reason is not None), name
        assert record.site or record.reason in LEFT_AS_MERGED | {NOT_LOADED}, (name, record.reason)


def check_sums(name: str, tensor: Tensor, statistics: Statistics, recorder: Recorder) -> None:
    """The statistics of one tensor are those of the independent measurement."""
    _, record = statistics.matcher.find(name, tensor)
    found = measured(name, tensor, recorder)
    if record.site is None:
        assert found is None, f"{name} is listed as {record.reason!r}, but it is multiplied"
        return
    assert found is not None, f"{name} has statistics, but no input of it was seen"
    axis, tokens, absolute, square = found
    assert record.input_axis == axis, name
    site = statistics.metadata.sites[record.site]
    counts = site.tokens if isinstance(site.tokens, list) else [site.tokens]
    if record.row is not None:
        counts = [counts[record.row]]
    assert counts == tokens, name
    for kind, expected in (("mean_abs", absolute), ("rms", square.sqrt())):
        values = IMPORTANCE.values(statistics, record, kind).double().reshape(expected.shape)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-7, msg=f"{name}: {kind}")


def measured(
    name: str, tensor: Tensor, recorder: Recorder
) -> tuple[int, list[int], Tensor, Tensor] | None:
    """Return a tensor's input axis, tokens, mean |x| and mean x² from the recorder.

    The last two have a row for each expert of a fused weight.
    """
    if name in recorder.scalings:
        sums = recorder.scalings[name]
        heads = tensor.shape[0] if tensor.ndim == 2 else 1
        means = [torch.as_tensor(one) / sums.tokens for one in (sums.absolute, sums.square)]
        return tensor.ndim - 1, [sums.tokens] * heads, means[0], means[1]
    for axis in range(max(tensor.ndim - 2, 0), tensor.ndim):
        experts = tensor.shape[0] if tensor.ndim == 3 else 1
        slots = [recorder.products.get((name, axis, index)) for index in range(experts)]
        if not any(slots):
            continue
        outputs = tensor.shape[tensor.ndim - 1 if axis == tensor.ndim - 2 else tensor.ndim - 2]
        for slot in slots:
            # The whole weight was multiplied, not a part of it.
            assert slot is None or len(slot.vectors) == outputs, name
        nothing = torch.zeros(tensor.shape[axis], dtype=torch.float64)
        absolute = [torch.as_tensor(s.absolute) / s.tokens if s else nothing for s in slots]
        square = [torch.as_tensor(s.square) / s.tokens if s else nothing for s in slots]
        tokens = [s.tokens if s else 0 for s in slots]
        if tensor.ndim == 2:
            return axis, tokens, absolute[0], square[0]
        return axis, tokens, torch.stack(absolute), torch.stack(square)
    return None


def merge(
    architecture: Architecture, base: Path, other: Path, statistics: Statistics, folder: Path
) -> dict[str, Tensor] | None:
    """Merge with ``aim`` through mergekit; None where mergekit refuses as is known of it."""
    omega: list[dict[str, object]] = [
        {"filter": name, "value": 1.0}
        for name, record in statistics.metadata.weights.items()
        if record.reason is not None and record.reason not in LEFT_AS_MERGED
    ]
    config = {
        "merge_method": "aim",
        "base_model": str(base),
        "models": [{"model": str(other), "parameters": {"weight": WEIGHT}}],
        "parameters": {
            "activation_stats": str(folder / "stats"),
            "omega": [*omega, {"value": OMEGA}],
        },
        "dtype": "float32",
    }
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(
        mergekit_yaml, [str(folder / "config.yml"), str(folder / "merged"), "--quiet"]
    )
    if architecture.refused:
        assert done.exit_code != 0
        assert architecture.refused in str(done.exception)
        return None
    assert done.exit_code == 0, done.output or repr(done.exception)
    return load_file(folder / "merged" / "model.safetensors")


def check_formula(
    name: str,
    merged: Tensor,
    base: Tensor,
    other: Tensor,
    statistics: Statistics,
    recorder: Recorder,
) -> None:
    """The merged tensor is AIM's, with the independent measurement's importance."""
    if not base.is_floating_point():
        assert torch.equal(merged, base)
        return
    gain = torch.ones((), dtype=torch.float64)
    found = measured(name, base, recorder)
    if found is not None:
        axis, _, importance, _ = found
        shape = [1] * base.ndim
        shape[axis] = base.shape[axis]
        if importance.ndim == 2:
            shape[0] = base.shape[0]
        peak = importance.amax(-1, keepdim=True)
        gain = 1 - (1 - OMEGA) * importance / torch.where(peak > 0, peak, 1)
        gain = gain.reshape(shape)
    expected = base.double() + WEIGHT * (other.double() - base.double()) * gain
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6, msg=name)


def load(path: Path, name: str) -> Tensor:
    """Return a tensor as mergekit loads it, fused where it fuses."""
    reference = ModelReference.parse(str(path))
    architecture = LazyTensorLoader.from_disk(str(path)).index.tensor_paths
    if name in architecture:
        return LazyTensorLoader.from_disk(str(path)).get_tensor(name)
    tensor = LoadTensor(model=reference, tensor=name).execute()
    assert tensor is not None
    return tensor


def load_plain(architecture: Architecture, path: Path) -> PreTrainedModel:
    """Load a model as transformers does by itself."""
    model: PreTrainedModel = getattr(transformers, architecture.model).from_pretrained(path)
    return model.eval()


def table_line(architecture: Architecture, outcome: Outcome) -> str:
    """Return an architecture's line of ``TABLE.md``."""
    metadata = outcome.metadata
    reasons = Counter(record.reason for record in metadata.weights.values() if record.reason)
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    count = sum(record.site is not None for record in metadata.weights.values())
    result = "works" if outcome.merged else f"calibrates; mergekit refuses: {architecture.note}"
    if outcome.merged and architecture.note:
        result += f" ({architecture.note})"
    file = f"`{architecture.file}`" if architecture.file else "none"
    return f"| {file} | `{architecture.model}` | {count} | {listed or 'none'} | {result} |"


transformers.utils.logging.disable_progress_bar()
