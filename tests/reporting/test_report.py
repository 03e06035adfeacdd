"""What a report shows is what stands in the directory, and nothing in it is taken for markup."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from mergekit_arm.cli.report import command
from mergekit_arm.imatrix.exporting import to_matrix
from mergekit_arm.imatrix.files import write_imatrix
from mergekit_arm.imatrix.importing import import_imatrix
from mergekit_arm.reporting.drawings import Drawing
from mergekit_arm.reporting.merged import merged_page
from mergekit_arm.reporting.page import Page, render
from mergekit_arm.reporting.places import places
from mergekit_arm.reporting.spread import Spread
from mergekit_arm.reporting.statistics import statistics_page
from mergekit_arm.reporting.stream import stream_page
from mergekit_arm.reporting.tune import tune_page
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.read import Statistics
from mergekit_arm.streaming.state import State
from tests.reporting.scene import (
    EVIL,
    Parsed,
    evil_state,
    merge,
    run_stream,
    run_tune,
    write_evil_search,
)
from tests.support.merges import OMEGA, weights
from tests.support.models import perturbed, tiny_experts


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments])


def written(directory: Path, out: Path) -> Parsed:
    done = run(directory, "-o", out)
    assert done.exit_code == 0, done.output
    return Parsed(out.read_text(encoding="utf-8"))


def drawn(page: Page, name: str) -> Drawing:
    (found,) = [one for one in page.drawings if one.name == name]
    return found


def cell(drawing: Drawing, kind: str, layer: int) -> float:
    """A cell of a heat map, by the text that is shown for it."""
    (data,) = drawing.data
    return float(data["text"][data["y"].index(kind)][data["x"].index(layer)])


@pytest.fixture(scope="module")
def merged(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(family, tmp_path_factory.mktemp("merged"))


def test_statistics(family: Path, tmp_path: Path) -> None:
    page = written(family / "stats", tmp_path / "r.html")
    assert page.titles() == ["importance", "peaks", "factors", "factors-by-kind", "energy", "ranks"]
    opened = Statistics("stats", family / "stats")
    shown = statistics_page(opened)
    record = opened.metadata.weights["model.layers.1.mlp.down_proj.weight"]
    values = IMPORTANCE.values(opened, record, "mean_abs").double()
    assert cell(drawn(shown, "importance"), "down_proj", 1) == pytest.approx(
        float(values.mean()), rel=1e-3
    )
    peak = float(values.max() / values.mean())
    assert cell(drawn(shown, "peaks"), "down_proj", 1) == pytest.approx(peak, rel=1e-3)
    channels = 0
    for one in opened.metadata.weights.values():
        channels += IMPORTANCE.values(opened, one, "mean_abs").numel() if one.site else 0
    (bars,) = drawn(shown, "factors").data
    assert sum(share or 0 for share in bars["y"]) == pytest.approx(1, abs=1e-3)
    assert max(at for at, share in zip(bars["x"], bars["y"], strict=True) if share) <= 1
    assert min(at for at, share in zip(bars["x"], bars["y"], strict=True) if share) >= 0.4
    # One channel of every input is the most active one, and has the factor ω.
    lowest = next(share for share in bars["y"] if share)
    assert lowest * channels >= 20 - 0.5
    energies = {line["name"]: line["y"] for line in drawn(shown, "energy").data}
    site = opened.metadata.sites["model.layers.1.mlp.down_proj"]
    assert energies["down_proj"][1] == pytest.approx(site.energy, abs=1e-4)


def test_statistics_that_lack_a_kind(family: Path, tmp_path: Path, measure: Any) -> None:
    only = measure(family / "base", tmp_path / "only", statistics=["importance"])
    page = written(only, tmp_path / "r.html")
    assert "energy" not in page.titles()
    assert any("Subspaces were not measured" in text for text in page.shown)


def test_a_merged_model(family: Path, merged: Path, tmp_path: Path) -> None:
    page = written(merged, tmp_path / "r.html")
    assert page.titles() == [
        "movement", "before-and-after", "kept", "factors", "factors-by-kind", "angles",
    ]  # fmt: skip
    shown = merged_page(merged)
    base, other, made = (weights(folder) for folder in (family / "base", family / "a", merged))
    name = "model.layers.1.mlp.up_proj.weight"
    after = (made[name] - base[name]).double().norm()
    before = (other[name] - base[name]).double().norm()
    assert after < before
    moved = cell(drawn(shown, "movement"), "up_proj", 1)
    assert moved == pytest.approx(float(after / base[name].double().norm()), rel=1e-3)
    kept = cell(drawn(shown, "kept"), "up_proj", 1)
    assert kept == pytest.approx(float(after / before), rel=1e-3)
    lines = {line["name"]: line["y"] for line in drawn(shown, "before-and-after").data}
    for which, model in (("before AIM", other), ("after AIM", made)):
        own = [n for n in base if n.startswith("model.layers.0.")]
        changes = sum(float((model[n] - base[n]).double().square().sum()) for n in own)
        sizes = sum(float(base[n].double().square().sum()) for n in own)
        assert lines[which][0] == pytest.approx((changes / sizes) ** 0.5, rel=1e-3)
    u, t = (made[name] - base[name]).flatten(), (other[name] - base[name]).flatten()
    angle = torch.rad2deg(torch.acos(torch.cosine_similarity(u, t, dim=0)))
    assert cell(drawn(shown, "angles"), "up_proj", 1) == pytest.approx(float(angle), abs=0.05)
    (box,) = drawn(shown, "factors-by-kind").data
    assert "embed_tokens" not in box["y"]  # left as merged
    assert min(box["lowerfence"]) >= OMEGA
    assert not shown.notes
    assert shown.listings[0][1] == (merged / "mergekit_config.yml").read_text()


def test_a_merge_that_drops_at_random_says_so(family: Path, tmp_path: Path) -> None:
    models = [{"model": str(family / "a"), "parameters": {"weight": 1.0, "density": 0.5}}]
    out = merge(family, tmp_path / "dare", merge_method="aim_dare_linear", models=models)
    assert any("at random" in note for note in merged_page(out).notes)


def test_a_merge_without_aim(family: Path, tmp_path: Path) -> None:
    out = merge(family, tmp_path / "plain", merge_method="task_arithmetic", parameters={})
    shown = merged_page(out)
    assert [one.name for one in shown.drawings] == ["movement", "angles"]
    values = drawn(shown, "angles").data[0]["z"]
    assert max(angle for row in values for angle in row) < 0.1  # straight towards the model


@pytest.mark.parametrize("gone", ["a", "a/model.safetensors", "stats", "base"])
def test_what_is_gone_is_said(family: Path, tmp_path: Path, gone: str) -> None:
    for name in ("base", "a", "stats"):
        shutil.copytree(family / name, tmp_path / name)
    out = merge(tmp_path, tmp_path / "merge")
    (tmp_path / gone).rename(tmp_path / "elsewhere")
    shown = merged_page(out)
    names = [one.name for one in shown.drawings]
    (note,) = shown.notes
    assert str(tmp_path / gone.partition("/")[0]) in note
    assert names == ([] if gone == "base" else ["movement"])
    if gone != "base":
        whole = merged_page(merge(family, tmp_path / "again"))
        for kind in ("up_proj", "input_layernorm"):
            moved = [cell(drawn(page, "movement"), kind, 1) for page in (shown, whole)]
            assert moved[0] == moved[1]


@pytest.mark.slow
def test_a_stream(tmp_path: Path) -> None:
    out = run_stream(tmp_path)
    page = written(out, tmp_path / "r.html")
    assert page.titles() == ["scores-1", "rates", "updates"]
    records = [json.loads(line) for line in (out / "stream.jsonl").read_text().splitlines()]
    state = json.loads((out / "stream_state.json").read_text())
    shown = stream_page(out, State.model_validate(state))
    lines = {line["name"]: line["y"] for line in drawn(shown, "scores-1").data}
    held = [state["base"]["held"], *(one["current"]["held"] for one in records)]
    assert lines["merged"] == pytest.approx(held, rel=1e-4)
    assert len(shown.tables[0].rows) == 4


def test_rotations_of_a_stream() -> None:
    lines = drawn(stream_page(Path("out"), evil_state()), "rotation").data
    assert {line["name"]: line["y"] for line in lines} == {"mean": [10, 20], "largest": [20, 40]}


@pytest.mark.slow
def test_a_search(tmp_path: Path) -> None:
    out = run_tune(tmp_path)
    page = written(out, tmp_path / "r.html")
    assert page.titles() == ["trials", "parameters", "front"]
    found = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    own = [one for one in found if one["study"] == "tune"]
    shown = tune_page(out)
    lines = {line["name"]: line for line in drawn(shown, "trials").data}
    assert lines["trial"]["y"] == pytest.approx([one["gain"] for one in own], abs=1e-4)
    best = max(one["gain"] for one in own)
    assert lines["best so far"]["y"][-1] == pytest.approx(best, abs=1e-4)
    (cloud,) = drawn(shown, "parameters").data
    assert cloud["x"] == pytest.approx([one["values"]["weight of a"] for one in own], abs=1e-4)
    assert "merge_method" in dict(shown.listings)["Configuration of the best trial"]
    (out / "trials.jsonl").write_text("{}\n")
    done = run(out, "-o", tmp_path / "again.html")
    assert done.exit_code == 2
    assert "is damaged" in done.output


def test_wrong_input(family: Path, tmp_path: Path) -> None:
    stats, out = family / "stats", tmp_path / "r.html"
    page = "<!doctype html>mine"
    (tmp_path / "there.html").write_text(page)
    (tmp_path / "card.md").write_text("mine")
    for arguments, said in (
        ((family / "base", "-o", out), "it holds none of stream_state.json"),
        ((tmp_path / "absent", "-o", out), "no such directory"),
        ((tmp_path / "there.html", "-o", out), "is a file"),
        ((stats, "-o", tmp_path / "no" / "r.html"), "there is no directory"),
        ((stats, "-o", tmp_path), "is a directory; name a file"),
        ((stats, "-o", tmp_path / "there.html"), "--force to replace it"),
        ((stats, "-o", tmp_path / "card.md", "--force"), "is no page; it will not be replaced"),
        ((stats,), "--output"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert said in done.output
        assert not out.exists()
    assert (tmp_path / "there.html").read_text() == page
    assert (tmp_path / "card.md").read_text() == "mine"
    assert run(stats, "-o", tmp_path / "there.html", "--force").exit_code == 0
    assert (tmp_path / "there.html").read_text().startswith("<!DOCTYPE html>")


def test_without_plotly(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    done = run(family / "stats", "-o", tmp_path / "r.html")
    assert done.exit_code == 2
    (line,) = done.output.splitlines()
    assert 'pip install "mergekit-arm[report]"' in line


def texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [
            one for key, inner in value.items() for one in texts(inner) if key != "hovertemplate"
        ]
    if isinstance(value, list):
        return [one for inner in value for one in texts(inner)]
    return [value] if isinstance(value, str) else []


def test_nothing_is_taken_for_markup(tmp_path: Path) -> None:
    search = tune_page(write_evil_search(tmp_path / EVIL.replace("/", "")))
    for shown in (stream_page(Path(EVIL), evil_state()), search):
        parsed = Parsed(render(replace(shown, notes=[EVIL], listings=[(EVIL, EVIL)])))
        tags = [tag for tag, _ in parsed.tags]
        assert not {"img", "a", "b", "iframe", "link", "object"} & set(tags)
        assert tags.count("script") == len(shown.drawings) + 2  # plotly before, the buttons after
        assert EVIL in "".join(parsed.shown)
        drawn_texts = [text for one in shown.drawings for text in texts([one.data, one.layout])]
        assert any("&lt;script&gt;" in text for text in drawn_texts)
        assert not [text for text in drawn_texts if "<" in text]


def test_every_outcome_of_a_trial_is_shown(tmp_path: Path) -> None:
    shown = tune_page(write_evil_search(tmp_path / "out"))
    lines = {line["name"]: (line["x"], line["y"]) for line in drawn(shown, "trials").data}
    assert lines["trial"] == ([0, 3, 4], [0.2, 0.9, 0.4])
    assert lines["given up"] == ([1], [-0.5])
    assert lines["task arithmetic"][1] == [0.6, 0.6]
    assert lines["best so far"][1] == [0.2, 0.9, 0.9]
    assert [table.title for table in shown.tables] == [
        "Best trials", "Best of tuned task arithmetic", "Failed trials",
    ]  # fmt: skip
    assert [row[0] for row in shown.tables[0].rows] == ["3", "4", "0"]
    method, value, words = drawn(shown, "parameters").data
    assert method["x"][0] == "ties"
    assert value["x"] == [0.1, 0.4, 0.6]
    assert "&lt;b&gt;" in words["x"][0]


def test_names_on_disk_are_not_taken_for_markup(family: Path, tmp_path: Path) -> None:
    odd = tmp_path / "<img src=x onerror=alert(1)>"
    odd.mkdir()
    for name in ("base", "a", "stats"):
        shutil.copytree(family / name, odd / name)
    out = merge(odd, odd / "out")
    with (out / "mergekit_config.yml").open("a") as file:
        file.write("# </pre><script>alert(1)</script>\n")
    parsed = written(out, tmp_path / "r.html")
    assert "img" not in [tag for tag, _ in parsed.tags]
    assert "<img src=x onerror=alert(1)>" in "".join(parsed.shown)
    assert len(parsed.scripts) == len(parsed.titles()) + 2


def test_a_page_loads_nothing_and_is_the_same_again(merged: Path, tmp_path: Path) -> None:
    parsed = written(merged, tmp_path / "r.html")
    for tag, attributes in parsed.tags:
        assert not {"src", "href", "srcset", "action", "data"} & attributes.keys(), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    style = parsed.text.partition("<style>")[2].partition("</style>")[0]
    assert "@import" not in style
    assert "url(" not in style
    (policy,) = [a["content"] for t, a in parsed.tags if t == "meta" and "http-equiv" in a]
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    found = re.findall(r"<script[^>]*>(.*?)</script>", parsed.text, re.DOTALL)
    hashes = {base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in found}
    assert hashes == set(re.findall(r"'sha256-([^']+)'", policy))
    written(merged, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "r.html").read_bytes()


def test_places_of_weights() -> None:
    names = [
        "model.layers.0.mlp.experts.3.down_proj.weight",
        "model.layers.0.mlp.shared_expert.down_proj.weight",
        "model.layers.12.self_attn.q_proj.weight",
        "model.norm.weight",
    ]
    assert [(one.layer, one.kind) for one in places(names).values()] == [
        (0, "experts.down_proj"),
        (0, "shared_expert.down_proj"),
        (12, "q_proj"),
        (None, "norm"),
    ]


def test_a_spread_counts() -> None:
    spread = Spread()
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for part in values.split(700):
        spread.add(part)
    assert spread.total == 5000
    for share in (0.01, 0.25, 0.5, 0.99):
        assert spread.quantile(share) == pytest.approx(float(values.quantile(share)), abs=2e-3)
    assert sum(spread.shares(50)) == pytest.approx(1)
    assert spread.shares(10)[3] == pytest.approx(
        float(((values >= 0.3) & (values < 0.4)).double().mean())
    )
    spread.add(torch.ones(3))
    assert spread.total == 5003


@pytest.mark.slow
def test_experts(tmp_path: Path, measure: Any) -> None:
    model = tiny_experts(0)
    model.save_pretrained(tmp_path / "base")
    perturbed(model, 1).save_pretrained(tmp_path / "a")
    stats = measure(tmp_path / "base", tmp_path / "stats", min_expert_tokens=190)
    shown = statistics_page(Statistics("stats", stats))
    assert any("experts saw too few tokens" in note for note in shown.notes)
    assert "down_proj" in drawn(shown, "importance").data[0]["y"]
    page = merged_page(merge(tmp_path, tmp_path / "merged"))
    assert not page.notes
    kept = drawn(page, "kept")
    (rows,) = kept.data
    experts = [kind for kind in rows["y"] if "down_proj" in kind]
    assert all(0.3 < cell(kept, kind, 0) < 1 for kind in experts)


def test_slices_are_compared_with_the_layers_they_came_from(
    family: Path, merged: Path, tmp_path: Path
) -> None:
    """The second layer twice: an output layer's base is the layer that its slice names."""
    sources = [
        {"model": str(family / "base"), "layer_range": [1, 2]},
        {"model": str(family / "a"), "layer_range": [1, 2], "parameters": {"weight": 1.0}},
    ]
    out = merge(
        family, tmp_path / "m", slices=[{"sources": sources}, {"sources": sources}], models=None
    )
    shown = merged_page(out)
    moved = drawn(shown, "movement")
    whole = drawn(merged_page(merged), "movement")
    assert cell(whole, "q_proj", 0) != cell(whole, "q_proj", 1)
    assert cell(moved, "q_proj", 0) == cell(moved, "q_proj", 1) == cell(whole, "q_proj", 1)
    assert not shown.notes


def test_statistics_of_an_importance_matrix_have_rms_alone(family: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    matrix = to_matrix(Statistics("stats", family / "stats"))
    squares = {name: replace(one, magnitudes=None) for name, one in matrix.entries.items()}
    write_imatrix(tmp_path / "squares.gguf", replace(matrix, entries=squares))
    import_imatrix(tmp_path / "squares.gguf", str(family / "base"), tmp_path / "stats")
    opened = Statistics("stats", tmp_path / "stats")
    shown = statistics_page(opened)
    record = opened.metadata.weights["model.layers.1.mlp.down_proj.weight"]
    values = IMPORTANCE.values(opened, record, "rms").double()
    importance = drawn(shown, "importance")
    assert cell(importance, "down_proj", 1) == pytest.approx(float(values.mean()), rel=1e-3)
    assert "√ mean x²" in importance.caption
    peak = float(values.max() / values.mean())
    assert cell(drawn(shown, "peaks"), "down_proj", 1) == pytest.approx(peak, rel=1e-3)
