"""A method is one file and one line: here, one class and one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit import merge_methods
from mergekit.merge_methods import TensorGroup
from mergekit.scripts.run_yaml import main as mergekit_yaml
from torch import Tensor

from mergekit_arm.methods import register
from mergekit_arm.methods.base import Found, OptOut, StatisticsMethod
from mergekit_arm.methods.parameters import number
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics
from tests.support.merges import refused, run, weights


class Quiet(StatisticsMethod):
    """Average the models in the input channels that are quiet in the base; keep the base's rest."""

    name = "quiet"
    title = "Quiet channels"
    opt_out = OptOut("share", 1, "averaged whole")
    parameters = (number("share", 0.5, 0, 1, "share of the input channels that are averaged"),)

    def needs(self, parameters: Mapping[str, Any], *, is_base: bool) -> bool:
        return is_base and parameters["share"] < 1

    def read(self, found: Found, parameters: Mapping[str, Any]) -> Tensor:
        return IMPORTANCE.values(found.statistics, found.record, "rms")

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        assert group.base is not None
        base = group.base.tensor
        average = torch.stack([entry.tensor for entry in group.non_base]).mean(dim=0)
        reading = self.find(group, group.base, parameters)
        if reading is None:  # an embedding, a bias, or share: 1
            return average
        count = int(parameters["share"] * len(reading.values))
        quiet = reading.values.argsort()[:count]
        merged = base.clone()
        merged.index_copy_(
            reading.input_axis, quiet, average.index_select(reading.input_axis, quiet)
        )
        return merged


class Whitened(StatisticsMethod):
    """Average the models channel by channel, weighted by each model's own mean |x|."""

    name = "whitened"
    title = "Weighted by every model's own activations"
    every_input = True

    def read(self, found: Found, parameters: Mapping[str, Any]) -> Tensor:
        return IMPORTANCE.values(found.statistics, found.record, "mean_abs")

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> Tensor:
        readings = [self.find(group, entry, parameters) for entry in group.entries]
        shares = torch.stack([torch.ones(1) if one is None else one.values for one in readings])
        tensors = torch.stack([entry.tensor for entry in group.entries])
        shares = shares.reshape(len(shares), *[1] * (tensors.ndim - 2), -1)
        return (tensors * shares).sum(dim=0) / shares.sum(dim=0)


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    register(Quiet)
    register(Whitened)
    register(Quiet)  # again: changes nothing
    yield
    for name in ("quiet", "whitened", "aim_quiet"):
        merge_methods.registry._METHODS.pop(name, None)


def document(family: Path, method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(family / "base"),
        "models": [{"model": str(family / name)} for name in ("a", "b")],
        "parameters": {"activation_stats": str(family / "stats"), **parameters},
        "dtype": "float32",
    }


def test_statistics_of_the_base(family: Path, tmp_path: Path) -> None:
    share = [{"filter": "self_attn", "value": [0.25, 1.0]}, {"value": 0.5}]
    found = weights(
        run(mergekit_yaml, yaml.safe_dump(document(family, "quiet", share=share)), tmp_path)
    )
    base, a, b = (weights(family / name) for name in ("base", "a", "b"))
    statistics = Statistics("stats", family / "stats")
    channels = 0
    for name, tensor in found.items():
        record = statistics.metadata.weights[name]
        here = 0.5 if "self_attn" not in name else 0.25 if "layers.0" in name else 1.0
        average = (a[name] + b[name]) / 2
        if record.site is None or here == 1:
            torch.testing.assert_close(tensor, average, msg=name)
            continue
        importance = IMPORTANCE.values(statistics, record, "rms").tolist()
        quiet = set(
            sorted(range(len(importance)), key=importance.__getitem__)[
                : int(here * len(importance))
            ]
        )
        for channel in range(len(importance)):
            wanted = average if channel in quiet else base[name]
            torch.testing.assert_close(tensor[..., channel], wanted[..., channel], msg=name)
            channels += 1
    assert channels > 300


def test_its_parameters_and_statistics_are_checked(family: Path, tmp_path: Path) -> None:
    line = refused(yaml.safe_dump(document(family, "quiet", share=2)), tmp_path)
    assert "share must lie in [0, 1], not 2" in line
    wrong = document(family, "quiet") | {"base_model": str(family / "b")}
    assert "another model or revision" in refused(yaml.safe_dump(wrong), tmp_path)


def test_aim_wraps_it_too(family: Path, tmp_path: Path) -> None:
    plain, relaxed = (
        weights(run(mergekit_yaml, yaml.safe_dump(document(family, name)), tmp_path / name))
        for name in ("quiet", "aim_quiet")
    )
    assert any(not torch.equal(plain[name], relaxed[name]) for name in plain)


def test_statistics_of_every_input(
    family: Path, tmp_path: Path, measure: Callable[..., Path]
) -> None:
    found = document(family, "whitened")
    line = refused(yaml.safe_dump(found), tmp_path)
    assert "whitened needs statistics of" in line
    stats = {"base": family / "stats"}
    for model, name in zip(found["models"], ("a", "b"), strict=True):
        stats[name] = measure(family / name, tmp_path / name)
        model["parameters"] = {"activation_stats": str(stats[name])}
    merged = weights(run(mergekit_yaml, yaml.safe_dump(found), tmp_path / "merge"))
    for name, tensor in merged.items():
        total, shares = 0.0, 0.0
        for model, folder in stats.items():
            statistics = Statistics(model, folder)
            record = statistics.metadata.weights[name]
            share = (
                IMPORTANCE.values(statistics, record, "mean_abs").double() if record.site else 1.0
            )
            total = total + weights(family / model)[name].double() * share
            shares = shares + share
        torch.testing.assert_close(tensor.double(), total / shares, rtol=1e-5, atol=1e-6, msg=name)
