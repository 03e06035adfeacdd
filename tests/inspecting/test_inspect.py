"""What ``inspect`` says of a directory is what stands in it; read here by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from mergekit_arm.cli.inspect import command
from mergekit_arm.inspecting.comparison import compare, pearson, principal_angles, spearman
from mergekit_arm.inspecting.summary import summarise
from mergekit_arm.inspecting.tensor import look_up
from mergekit_arm.statistics.read import Statistics
from tests.support.models import tiny_experts
from tests.support.stored import Folder

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def others(
    family: Path, tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]
) -> Path:
    """Statistics of ``a``; of the base on fewer rows; of experts, few of which see tokens."""
    folder = tmp_path_factory.mktemp("others")
    measure(family / "a", folder / "of-a")
    measure(family / "base", folder / "fewer", samples=3)
    measure(family / "base", folder / "importance", statistics=["importance"])
    tiny_experts(0).save_pretrained(folder / "experts")
    measure(folder / "experts", folder / "of-experts", min_expert_tokens=190)
    return folder


def opened(path: Path) -> Statistics:
    return Statistics(str(path), path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments])


def test_the_summary_counts_what_is_there(family: Path) -> None:
    found, stored = summarise(opened(family / "stats")), Folder.open(family / "stats")
    weights = stored.metadata["weights"].values()
    assert found.measured == sum("site" in one for one in weights)
    assert found.weights == len(weights)
    assert found.measured + sum(found.reasons.values()) == len(weights)
    assert [one.site for one in found.inputs] == list(stored.metadata["sites"])
    assert found.size == (family / "stats" / "model.safetensors").stat().st_size
    (down,) = [one for one in found.inputs if one.site == DOWN]
    sums = stored.tensors[f"{DOWN}.abs_sum"].numpy()
    assert down.peak == pytest.approx(sums.max() / sums.mean())
    assert down.held == pytest.approx(sums.max() / sums.sum())  # of 48 channels, one
    assert (down.layer, down.rank) == (1, stored.tensors[f"{DOWN}.basis"].shape[1])
    eigenvalues, trace = stored.tensors[f"{DOWN}.eigenvalues"], stored.tensors[f"{DOWN}.trace"]
    assert down.energy == pytest.approx(float(eigenvalues.double().sum() / trace), abs=1e-5)
    assert found.skewed[0].peak == max(one.peak or 0 for one in found.inputs)
    assert found.subspaces[0].energy == min(one.energy or 2 for one in found.subspaces)


def test_starved_experts_are_named(others: Path) -> None:
    found = summarise(opened(others / "of-experts"))
    stored = Folder.open(others / "of-experts").metadata
    counts = [s["tokens"] for s in stored["sites"].values() if isinstance(s["tokens"], list)]
    assert found.experts == 8
    assert 0 < len(found.starved) < 8
    assert all(tokens < 190 for tokens in found.starved.values())
    assert set(found.starved.values()) <= {one for row in counts for one in row}
    assert "saw too few tokens" in run(others / "of-experts").output


def test_one_weight(family: Path, others: Path) -> None:
    stored = Folder.open(family / "stats")
    q = look_up(opened(family / "stats"), "model.layers.0.self_attn.q_proj.weight")
    site = str(stored.record(q.name)["site"])
    sums = stored.tensors[f"{site}.abs_sum"].numpy() / stored.metadata["sites"][site]["tokens"]
    assert [channel for channel, _ in q.channels] == np.argsort(-sums)[:5].tolist()
    assert [value for _, value in q.channels] == pytest.approx(np.sort(sums)[::-1][:5].tolist())
    assert {name.rpartition(".self_attn.")[2] for name in q.shared} == {
        "k_proj.weight",
        "v_proj.weight",
    }
    shares = stored.tensors[f"{site}.eigenvalues"].double() / stored.tensors[f"{site}.trace"]
    assert q.leading == pytest.approx(shares[:5].tolist())
    embedding = look_up(opened(family / "stats"), "model.embed_tokens.weight")
    assert embedding.record.reason == "embedding"
    bare = look_up(opened(others / "importance"), DOWN)
    assert (bare.name, bare.rank, bare.leading) == (f"{DOWN}.weight", None, [])
    expert = look_up(opened(others / "of-experts"), "model.layers.0.mlp.experts.1.down_proj.weight")
    row = Folder.open(others / "of-experts").record(expert.name)
    tokens = Folder.open(others / "of-experts").metadata["sites"][row["site"]]["tokens"]
    assert expert.tokens == tokens[row["row"]]


def test_a_directory_compared_with_itself(family: Path) -> None:
    found = compare(opened(family / "stats"), opened(family / "stats"))
    assert found.same_model
    assert not found.differences
    assert found.same_weights == (21, 21)
    for layer in found.layers():
        assert layer.correlation == pytest.approx(1)
        assert layer.ranks == pytest.approx(1)
        if layer.layer is not None:
            assert layer.overlap == pytest.approx(1)
            assert layer.largest_angle == pytest.approx(0, abs=1e-3)


def test_other_data_and_another_model(family: Path, others: Path) -> None:
    found = compare(opened(family / "stats"), opened(others / "fewer"))
    assert found.same_model
    assert {"data.sequences", "data.tokens", "data.content_hash"} <= found.differences.keys()
    assert not [name for name in found.differences if name.startswith("model.")]
    (down,) = [one for one in found.inputs if one.site == DOWN]
    one, two = Folder.open(family / "stats"), Folder.open(others / "fewer")
    sums = [folder.tensors[f"{DOWN}.abs_sum"].numpy() for folder in (one, two)]
    assert down.correlation == pytest.approx(np.corrcoef(*sums)[0, 1])
    ranks = [[sum(other < value for other in row) for value in row] for row in sums]
    assert down.ranks == pytest.approx(np.corrcoef(*ranks)[0, 1])
    bases = [folder.tensors[f"{DOWN}.basis"].double().numpy() for folder in (one, two)]
    k = min(base.shape[1] for base in bases)
    qs = [np.linalg.qr(base[:, :k])[0] for base in bases]
    cosines = np.linalg.svd(qs[0].T @ qs[1], compute_uv=False)
    assert down.directions == k
    assert down.overlap == pytest.approx((cosines**2).mean(), abs=1e-4)
    assert down.largest_angle == pytest.approx(np.degrees(np.arccos(cosines.min())), abs=0.1)
    unlike = compare(opened(family / "stats"), opened(others / "of-a"))
    assert not unlike.same_model
    assert unlike.same_weights == (21, 0)
    assert {"model.content_hash", "model.reference"} <= unlike.differences.keys()


def test_what_one_has_not_measured_is_left_open(family: Path, others: Path) -> None:
    found = compare(opened(family / "stats"), opened(others / "importance"))
    assert all(one.directions is None and one.correlation is not None for one in found.inputs)
    assert "–" in run(family / "stats", others / "importance").output


def test_angles_that_are_known() -> None:
    tilt = [1e-6, 0.3, np.pi / 2]
    one, two = np.eye(8)[:, :3], np.zeros((8, 3))
    for column, angle in enumerate(tilt):
        two[column, column], two[column + 3, column] = np.cos(angle), np.sin(angle)
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
    mixed, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    found = principal_angles(torch.tensor(turn @ one), torch.tensor(turn @ two @ mixed))
    assert found.deg2rad().tolist() == pytest.approx(tilt, rel=1e-6)


def test_correlations_that_are_known() -> None:
    x = torch.tensor([1.0, 2.0, 2.0, 5.0])
    assert pearson(x, 3 - 2 * x) == pytest.approx(-1)
    assert spearman(x, x**3) == pytest.approx(1)
    assert pearson(x, torch.ones(4)) is None
    assert spearman(x, torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(
        np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1]
    )


def test_the_command(family: Path, others: Path) -> None:
    stats = family / "stats"
    text = run(stats).output
    assert "20 of 21 weights at 14 inputs" in text
    assert json.loads(run(stats, "--json").stdout)["coverage"]["measured"] == 20
    document = json.loads(run(stats, others / "fewer", "--json").stdout)
    assert [one["layer"] for one in document["layers"]] == [0, 1, None]
    assert json.loads(run(stats, "--tensor", DOWN, "--json").stdout)["name"] == f"{DOWN}.weight"
    for arguments, said in (
        ((family / "base",), "no activation_stats.json"),
        ((stats, "--tensor", "model.layers.1.mlp.dwon_proj.weight"), f"did you mean '{DOWN}"),
        ((stats, others / "of-experts"), ""),
        ((stats, others / "fewer", "--tensor", DOWN), "leave OTHER out"),
        (("./absent",), "no such directory"),
    ):
        done = run(*arguments)
        assert (done.exit_code == 2) == bool(said), done.output
        assert said in done.output
