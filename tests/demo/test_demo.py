"""The demo: its text, its trainer, and a whole run with few steps."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import io
import json
import subprocess
import sys
import sysconfig
import tokenize
from collections.abc import Iterable
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from rich.console import Console
from transformers import AutoTokenizer, LlamaForCausalLM

from mergekit_arm.cli.main import cli
from mergekit_arm.cli.tables.demo import closing, loss_table
from mergekit_arm.demo import demo as demo_module
from mergekit_arm.demo import merges
from mergekit_arm.demo.demo import DemoOptions, run_demo
from mergekit_arm.demo.merges import merged_models, tune_configs
from mergekit_arm.demo.stream import early_steps
from mergekit_arm.demo.text import DOMAINS, DomainText, half, paragraphs, standard_library
from mergekit_arm.demo.train import new_model, save, token_blocks, train, train_tokenizer
from mergekit_arm.errors import Failure, InputError
from mergekit_arm.judging.heldout import load_heldout
from mergekit_arm.judging.sets import HeldOutSet
from tests.support import forks

CHARACTERS = 120_000
TRIALS = 2


@pytest.fixture(scope="module")
def corpora() -> dict[str, DomainText]:
    return standard_library(characters=CHARACTERS)


@pytest.fixture(scope="module")
def blocks(corpora: dict[str, DomainText]) -> torch.Tensor:
    return token_blocks(train_tokenizer(corpora["code"].train), corpora["code"].train, 64)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, demo_module.LossTable, str]:
    """A run with hardly any training or tuning: where it lies, its return value, its output."""
    out = tmp_path_factory.mktemp("demo") / "out"
    console = Console(file=io.StringIO(), width=120)
    options = DemoOptions(out, base_steps=4, specialist_steps=2, characters=CHARACTERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merges, "TRIALS", TRIALS)
        losses = run_demo(options, Console(quiet=True))
    for one in (loss_table(losses), closing(out, losses, 1.0)):
        console.print(one, highlight=False, soft_wrap=True)
    return out, losses, console.file.getvalue()  # type: ignore[attr-defined]


def digest(folder: Path) -> dict[str, str]:
    # mergekit's card lists the models of a merge in an order that changes from run to run.
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != "README.md"]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def test_heldout_text_occurs_in_no_training_text(corpora: dict[str, DomainText]) -> None:
    trained = {p for c in corpora.values() for document in c.train for p in paragraphs(document)}
    for domain in DOMAINS:
        heldout = [p for document in corpora[domain].heldout for p in paragraphs(document)]
        assert heldout
        assert not trained.intersection(heldout)


def test_text_depends_on_the_seed_alone(corpora: dict[str, DomainText]) -> None:
    assert standard_library(characters=CHARACTERS) == corpora
    assert standard_library(characters=CHARACTERS, seed=1) != corpora


def test_code_is_only_code(corpora: dict[str, DomainText]) -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for document in corpora["code"].train:
        tokens = tokenize.generate_tokens(io.StringIO(document).readline)
        assert not [token for token in tokens if token.type == tokenize.COMMENT]
        nodes = [n for n in ast.walk(ast.parse(document)) if isinstance(n, documented)]
        assert not any(map(ast.get_docstring, nodes))


def test_a_python_without_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": "/nonexistent"})
    with pytest.raises(Failure, match="without its sources"):
        standard_library()


def test_tokenizer_loses_nothing(corpora: dict[str, DomainText]) -> None:
    tokenizer = train_tokenizer(corpora["prose"].train, 400)
    strange = "tab\there, Größe \N{GREEK SMALL LETTER OMEGA} \N{SNAKE}\r\n  end"
    assert tokenizer.decode(tokenizer(strange)["input_ids"]) == strange


def test_blocks_join_texts_with_the_end_token(corpora: dict[str, DomainText]) -> None:
    tokenizer = train_tokenizer(corpora["prose"].train, 400)
    ids = token_blocks(tokenizer, ["one two", "three"], 3).flatten().tolist()
    whole = "one two<|endoftext|>three<|endoftext|>"
    assert ids == tokenizer(whole)["input_ids"][: len(ids)]
    assert len(ids) % 3 == 0


def plain_loss(model: LlamaForCausalLM, blocks: Iterable[torch.Tensor]) -> float:
    """Return the mean cross-entropy of every predicted token, in float64."""
    chances = []
    with torch.inference_mode():
        for block in blocks:
            logs = model(input_ids=block[None]).logits[0].double().log_softmax(-1)
            chances.append(logs[:-1].gather(-1, block[1:, None]))
    return -float(torch.cat(chances).mean())


def test_training_learns_and_repeats(corpora: dict[str, DomainText], blocks: torch.Tensor) -> None:
    tokenizer = train_tokenizer(corpora["code"].train)
    untrained = plain_loss(new_model(seed=7), blocks[:16])
    models = []
    for seed in (7, 7, 8):
        model = new_model(seed=7)
        seen: list[int] = []
        train(
            model,
            tokenizer,
            blocks[:64],
            steps=30,
            learning_rate=3e-3,
            seed=seed,
            on_step=seen.append,
        )
        assert seen == list(range(1, 31))
        assert plain_loss(model, blocks[:16]) < untrained - 1
        models.append(model.state_dict())
    first, again, other = models
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_checkpoints_are_saved_on_the_way(
    tmp_path: Path, corpora: dict[str, DomainText], blocks: torch.Tensor
) -> None:
    tokenizer = train_tokenizer(corpora["code"].train)
    model = new_model()
    train(
        model,
        tokenizer,
        blocks,
        steps=5,
        learning_rate=1e-3,
        folder=tmp_path / "run",
        save_at=(2, 4),
    )
    save(model, tokenizer, tmp_path / "end")
    found = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert found == ["checkpoint-2", "checkpoint-4"]
    early, late, end = (
        LlamaForCausalLM.from_pretrained(tmp_path / name).lm_head.weight
        for name in ("run/checkpoint-2", "run/checkpoint-4", "end")
    )
    assert torch.equal(end, model.lm_head.weight)
    assert not torch.equal(early, late)
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint-4").eos_token_id == 0


def test_early_checkpoints_come_from_the_first_half() -> None:
    assert early_steps(120) == {12, 24, 36, 48}
    assert early_steps(2) == {1}


@pytest.mark.slow
def test_demo_reports_what_lies_on_disk(demo: tuple[Path, demo_module.LossTable, str]) -> None:
    out, losses, printed = demo
    assert json.loads((out / "losses.json").read_text()) == losses
    tokenizer = AutoTokenizer.from_pretrained(out / "merged" / "aim")
    model = LlamaForCausalLM.from_pretrained(out / "merged" / "aim")
    for domain in DOMAINS:
        settings = HeldOutSet(
            dataset=str(out / "heldout" / f"{domain}.jsonl"), samples=10**6, sequence_length=128
        )
        blocks = [sequence.ids for sequence in load_heldout(settings, [tokenizer]).sequences]
        rows = (out / "heldout" / f"{domain}.jsonl").read_text().splitlines()
        texts = [json.loads(row)["text"].strip() for row in rows]
        tokens = sum(len(tokenizer(text, verbose=False)["input_ids"]) for text in texts)
        assert len(blocks) == tokens // 128  # all of the text
        assert plain_loss(model, blocks) == pytest.approx(losses["aim"][domain], rel=1e-5)
    for name, row in losses.items():
        assert name in printed
        average = sum(row.values()) / len(row)
        assert all(f"{value:.3f}" in printed for value in (*row.values(), average))
    assert len({json.dumps(row) for row in losses.values()}) == len(losses)
    merges = {name: sum(losses[name].values()) for name in merged_models()}
    assert f"lowest average is {min(merges, key=merges.__getitem__)}," in printed


@pytest.mark.slow
def test_what_is_tuned_never_sees_the_table_s_text(
    demo: tuple[Path, demo_module.LossTable, str],
) -> None:
    out, _, _ = demo
    for name, config in tune_configs().items():
        best = yaml.safe_load((out / "tuned" / name / "best.yml").read_text())
        assert best["merge_method"] == name
        assert "tune" not in json.dumps(best)
        sets = config["tuning"]["evaluation"].values()
        assert all(one["dataset"].startswith("validation/") for one in sets)
    for domain in DOMAINS:
        seen, kept = (
            {p for row in (out / folder / f"{domain}.jsonl").read_text().splitlines()
             for p in paragraphs(json.loads(row)["text"])}
            for folder in ("validation", "heldout")
        )  # fmt: skip
        assert len(kept - seen) > 0.9 * len(kept)  # a line such as "import os" may be in both


def test_halves_make_the_document() -> None:
    document = "one\n\ntwo\n\n\nthree"
    assert [half(document, number) for number in (0, 1)] == ["one", "two\n\nthree"]
    assert half("one", 0) == ""


@pytest.mark.slow
def test_printed_commands_repeat_the_demo(demo: tuple[Path, demo_module.LossTable, str]) -> None:
    out, _, printed = demo
    lines = printed.split("cd ", 1)[1].replace("\\\n", "").splitlines()[1:3]
    before = digest(out)
    for line in lines:
        program, *arguments = line.split()
        ended = forks.run(program, *arguments, cwd=out)
        assert ended.returncode == 0, ended.stderr
    assert [line.split()[0] for line in lines] == ["mergekit-arm", "mergekit-yaml"]
    assert digest(out) == before


def test_nothing_but_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("mine")
    options = DemoOptions(taken, force=True)
    for path, message in ((taken, "not empty and no demo"), (taken / "file", "is a file")):
        with pytest.raises(InputError, match=message):
            run_demo(dataclasses.replace(options, out=path), Console(quiet=True))
    (taken / demo_module.MARKER).write_text("{}")
    result = CliRunner().invoke(cli, ["demo", "--out", str(taken)])
    assert result.exit_code == 2
    assert "--force" in result.output
    assert (taken / "file").read_text() == "mine"


def test_force_replaces_an_earlier_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / demo_module.MARKER).write_text("{}")
    (tmp_path / "stale").write_text("")

    def stop(*_: object) -> None:
        raise click.Abort

    monkeypatch.setattr(demo_module, "train_tokenizer", stop)
    with pytest.raises(click.Abort):
        run_demo(DemoOptions(tmp_path, force=True, characters=CHARACTERS), Console(quiet=True))
    assert not (tmp_path / "stale").exists()
    assert (tmp_path / demo_module.MARKER).exists()
    assert (tmp_path / "configs" / "aim.yml").exists()


def test_without_our_methods_it_stops_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module.merge_methods, "registered_methods", list)
    with pytest.raises(Failure, match="MERGEKIT_ARM_AUTOLOAD"):
        run_demo(DemoOptions(tmp_path / "out"), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from mergekit_arm.cli.main import cli; "
        "cli.main(['demo', '--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert "--out" in shown
    assert shown.endswith("False\n")
