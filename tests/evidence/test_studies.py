"""The studies, whole, at size tiny: every unit runs, and a second start finds nothing to do."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

pytest.importorskip("reasoning_gym", reason="pip install -e '.[evidence]'")

from mergekit_arm.statistics.read import Statistics as Reader
from tests.evidence import specialists
from tests.evidence.__main__ import main
from tests.evidence.bases import load
from tests.evidence.judging import generate, generate_missed, judge_answers
from tests.evidence.merging import BASE, merge, put
from tests.evidence.recipes import ByDepth, ByName, Recipe, Statistics
from tests.evidence.runs import Base, Run, states
from tests.evidence.sizes import SIZES
from tests.evidence.streams import Stream, recipes
from tests.evidence.tables import page
from tests.evidence.tuning import best
from tests.evidence.units import Store
from tests.evidence.variants import fewer_columns
from tests.evidence.walks import WALKS, follow

pytestmark = pytest.mark.slow
TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evidence")


def study(folder: Path, *options: str) -> list[str]:
    given = [*options, "--size", "tiny", "--work", str(folder), "--results", str(folder / "lines")]
    done = CliRunner().invoke(main, given, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return [line for line in done.output.splitlines() if "/tiny/" in line]


@pytest.fixture(scope="module")
def stream(folder: Path) -> Stream:
    """The first run, all of its core done."""
    study(folder, "streams", "--core", "--only", "*/reverse/0/*")
    return Stream(Base(TINY, folder), "reverse", 0, Store("streams", "tiny", folder / "lines"))


def test_a_second_start_finds_nothing_to_do(stream: Stream, folder: Path) -> None:
    listed = study(folder, "streams", "--core", "--dry-run", "--only", "*/reverse/0/*")
    assert len(listed) > 20
    assert all(line.startswith("done") for line in listed)
    assert study(folder, "streams", "--core", "--only", "*/reverse/0/*") == []


def test_checkpoints_that_are_gone_are_trained_again(stream: Stream) -> None:
    last = stream.run.checkpoint(1.0) / "model.safetensors"
    before = load_file(last)
    last.unlink()
    again = load_file(Run(stream.base, "reverse", 0).checkpoint(1.0) / "model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(again[name], tensor, msg=name)


def test_training_learns_the_answers(stream: Stream) -> None:
    losses = stream.store.run(stream.training())["step_losses"]
    assert len(losses) == TINY.steps
    assert fmean(losses[-3:]) < fmean(losses[:3]) - 0.5


def test_the_test_split_sees_the_best_of_the_validation_split(stream: Stream) -> None:
    for recipe in recipes(TINY)["core"]:
        tried = [stream.store.run(unit) for unit in stream.attempts(recipe)]
        losses = [fmean(line["losses"]) for line in tried]
        assert len(tried) == len(TINY.rates)
        assert losses[best(tried)] == min(losses)
        assert stream.store.run(stream.final(recipe))["settings"] == tried[best(tried)]["settings"]


def test_a_whole_linear_step_is_the_average_itself(stream: Stream) -> None:
    (linear, *_) = recipes(TINY)["core"]
    merged = stream.merged(linear, {"weight": 1.0})
    for name, tensor in stream.state("early").items():
        torch.testing.assert_close(merged[name], tensor, msg=name)


def test_methods_differ_where_their_statistics_do(stream: Stream) -> None:
    def step(of: str, rotation: float = -0.4) -> torch.Tensor:
        settings = {"learning_rate": 1.0, "rotation": rotation, "activation_stats": Statistics(of)}
        models = {"early": stream.state("early")}
        merged = merge(
            "arm", stream.state(BASE), models, settings, lambda of, _: stream.run.statistics(of)
        )
        return merged["model.layers.0.mlp.down_proj.weight"]

    plain = step("general", 0.0)
    turned = [step(of) for of in ("general", "task", "random")]
    for one in turned:
        assert not torch.allclose(one, plain, atol=1e-6)
        base = stream.state(BASE)["model.layers.0.mlp.down_proj.weight"]
        torch.testing.assert_close((one - base).norm(dim=1), (plain - base).norm(dim=1))
    assert not torch.allclose(turned[0], turned[2], atol=1e-6)


def test_a_parameter_may_depend_on_the_weight(stream: Stream) -> None:
    names = ["model.embed_tokens.weight", *(f"model.layers.{n}.mlp.w" for n in (0, 1, 2)), "norm"]
    assert ByDepth(-0.8, 0.0)(names) == pytest.approx([-0.8, -0.8, -0.4, 0.0, 0.0])
    assert ByName((("mlp", 1.0), ("", 0.0)))(names) == [0, 1, 1, 1, 0]

    def step(rotation: float | ByName) -> dict[str, torch.Tensor]:
        settings = {"rotation": rotation, "activation_stats": Statistics("general")}
        recipe = Recipe("", "arm", ("early",), ())
        return stream.merged(recipe, settings)

    plain, turned, some = (step(one) for one in (0.0, -0.7, ByName((("mlp", -0.7), ("", 0.0)))))
    attention, mlp = "model.layers.0.self_attn.v_proj.weight", "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(some[attention], plain[attention])
    assert torch.equal(some[mlp], turned[mlp])
    assert not torch.equal(some[mlp], plain[mlp])


def test_a_walk_never_gets_worse_where_it_looks(stream: Stream, folder: Path) -> None:
    for walk in WALKS:
        line = stream.store.run(stream.walk(walk))
        rates = line["settings"]["learning_rates"]
        assert len(rates) == 3
        assert set(rates) <= {0.0, *TINY.rates}

    def loss(state: dict[str, torch.Tensor]) -> float:
        return fmean(stream.judge("validation", state)["losses"])

    state, rates = follow(WALKS[0], stream.run, stream.state(BASE), TINY.rates, loss)
    assert loss(state) <= loss(stream.state(BASE))
    # A linear step of rate r, done by hand.
    expected = dict(stream.state(BASE))
    for rate, name in zip(rates, ("15 %", "20 %", "25 %"), strict=True):
        target = stream.state(name)
        expected = {key: own + rate * (target[key] - own) for key, own in expected.items()}
    for key, tensor in expected.items():
        torch.testing.assert_close(state[key], tensor, msg=key)


def test_moments_without_data_are_those_of_the_task_vectors(stream: Stream) -> None:
    run, site = stream.run, "model.layers.1.mlp.down_proj"
    found = load_file(run.statistics("own-free") / "model.safetensors")
    known = load_file(run.statistics("own") / "model.safetensors")
    name = f"{site}.weight"
    moved = (states(run.checkpoint(1.0))[name] - stream.state(BASE)[name]).double()
    moment = moved.T @ moved * (known[f"{site}.trace"] / moved.square().sum())
    basis, values = found[f"{site}.basis"].double(), found[f"{site}.eigenvalues"].double()
    for column, value in zip(basis.T, values, strict=True):
        rounding = 2**-7 * float(values[0])  # bases are kept in bfloat16
        torch.testing.assert_close(moment @ column, value * column, atol=rounding, rtol=0)
    scale = found[f"{site}.square_sum"].sum() / known[f"{site}.trace"]
    torch.testing.assert_close(
        found[f"{site}.square_sum"] / scale, moment.diag(), rtol=1e-5, atol=0
    )


def test_controls_keep_what_they_promise(stream: Stream) -> None:
    files = {
        of: load_file(stream.base.statistics(of) / "model.safetensors")
        for of in ("general", "random", "permuted", "even")
    }
    whole = files["general"]
    bases = [name for name in whole if name.endswith(".basis")]
    sums = [name for name in whole if name.endswith(".abs_sum")]
    assert bases
    assert sums
    for name in bases:
        drawn = files["random"][name].double()
        assert drawn.shape == whole[name].shape
        torch.testing.assert_close(
            drawn.T @ drawn, torch.eye(drawn.shape[1]).double(), atol=0.03, rtol=0
        )
    for name in sums:
        assert torch.equal(files["permuted"][name].sort().values, whole[name].sort().values)
        even = files["even"][name]
        assert even.argmax() == whole[name].argmax()
        torch.testing.assert_close(even.mean(), whole[name].mean())
        assert len(even.unique()) <= 2


def test_what_is_not_generated_would_have_come_out_right(stream: Stream) -> None:
    run, model = stream.run, load(stream.base.folder, "cpu")
    # Learnt by heart, some answers are exact and others not.
    put(model, stream.state("100 %"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    data, examples = run.encoded["training"][:4], run.examples["training"][:4]
    for _ in range(120):
        for row in data[:3]:
            ids = torch.tensor([row.prompt + row.answer])
            labels = ids.clone()
            labels[:, : len(row.prompt)] = -100
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    exact = judge_answers(model, data).exact
    assert "1" in exact
    assert "0" in exact
    whole = generate(model, stream.base.tokenizer, data, examples)
    assert whole == generate_missed(model, stream.base.tokenizer, data, examples, exact)
    assert all(b == "1" for a, b in zip(exact, whole, strict=True) if a == "1")


def test_answers_are_judged_as_transformers_would(stream: Stream) -> None:
    model = put(load(stream.base.folder, "cpu"), stream.state("100 %"))
    data = stream.run.encoded["test"]
    judged = judge_answers(model, data)
    for row, loss in zip(data, judged.losses, strict=True):
        ids = torch.tensor([row.prompt + row.answer])
        labels = ids.clone()
        labels[:, : len(row.prompt)] = -100
        with torch.inference_mode():
            expected = model(input_ids=ids, labels=labels).loss
        assert loss == pytest.approx(float(expected), rel=1e-4)


def test_specialists_are_merged(stream: Stream, folder: Path) -> None:
    stages = [f"--stage={name}" for name in specialists.STAGES if name != "searches"]
    done = study(folder, "specialists", *stages)
    labels = {line.partition("/test/")[2].rpartition("  ")[0].strip() for line in done}
    assert {"regmean", "task_arithmetic", "aim_ties", "aim, weights 1, permuted"} <= labels
    assert study(folder, "specialists", *stages) == []
    text = page(folder / "lines")
    assert "### reverse+add, seed 0" in text
    assert "### reverse, seed 0" in text


def test_settings_are_changed_one_at_a_time(stream: Stream, folder: Path) -> None:
    lines = [stream.store.run(unit) for unit in stream.stage("sweep")]
    known = lines[0]
    assert len(known["losses"]) == TINY.validation
    for line in lines[1:]:
        assert line["settings"] != known["settings"]
        if "columns" not in line["unit"]:  # tiny bases have no more than are kept
            assert line["losses"] != known["losses"], line["unit"]
    unturned, *turned = (stream.store.run(unit) for unit in stream.stage("turns"))
    assert all(line["losses"] != unturned["losses"] for line in turned)
    for part in ("sweep", "turns"):
        assert f"### streams, size tiny, {part}" in page(folder / "lines")
    files = {
        of: load_file(stream.run.statistics(of) / "model.safetensors")
        for of in ("task", "task~diagonal")
    }
    site = "model.layers.0.mlp.down_proj"
    whole = files["task"][f"{site}.basis"]
    fewer_columns(3)(stream.run.statistics("task"), folder / "three")
    three = load_file(folder / "three" / "model.safetensors")
    assert torch.equal(three[f"{site}.basis"], whole[:, :3])
    assert all(one.shape[-1] <= 3 for name, one in three.items() if name.endswith(".basis"))
    opened = Reader("three", folder / "three")
    for name in opened.names:
        opened.stored(name)
    assert torch.equal(three[f"{site}.eigenvalues"], files["task"][f"{site}.eigenvalues"][:3])
    assert not files["task~diagonal"][f"{site}.eigenvalues"].any()
    assert torch.equal(files["task~diagonal"][f"{site}.basis"], whole)


@pytest.mark.long
def test_the_package_searches_as_the_grid_does(stream: Stream, folder: Path) -> None:
    only = "*/aim_task_arithmetic, by tune"
    (done,) = study(folder, "specialists", "--stage=searches", "--only", only)
    lines = Store("specialists", "tiny", folder / "lines").lines()
    (line,) = (line for unit, line in lines.items() if unit.endswith("by tune"))
    assert "by tune" in done
    assert min(TINY.weights) <= line["settings"]["weight"] <= max(TINY.weights)
    assert 0 <= line["settings"]["omega"] <= 0.8


def test_a_unit_that_does_not_exist_is_refused(folder: Path) -> None:
    given = ["streams", "--size", "tiny", "--work", str(folder), "--only", "nothing"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 2
    assert "no unit is called nothing" in done.output
    done = CliRunner().invoke(main, [*given, "--stage", "sparse"])
    assert done.exit_code == 2
    assert "streams has no stage sparse" in done.output
