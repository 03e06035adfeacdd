"""Statistics go to the Hub in one commit, with a card that it accepts, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from mergekit_arm.cli.push import command
from mergekit_arm.statistics.card import statistics_card
from mergekit_arm.statistics.format import Metadata, MixtureRecord
from mergekit_arm.statistics.read import Statistics
from tests.support.fake_hub import TOKEN, FakeHub, card_problem, fake_hub

NAME = "someone/tiny-stats"
COMMIT = "f" * 40


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def stats(family: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(family / "stats", tmp_path / "stats"))


def push(*arguments: object) -> Result:
    return CliRunner().invoke(command, [str(one) for one in arguments])


def test_everything_goes_up_in_one_commit(hub: FakeHub, stats: Path) -> None:
    done = push(stats, NAME, "--license", "mit")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == f"{hub.address}/{NAME}"
    assert hub.commits == ["Upload activation statistics"]
    files = hub.repositories[NAME]
    assert files.keys() == {".gitattributes", *(one.name for one in stats.iterdir())}
    for name in ("model.safetensors", "activation_stats.json"):
        assert files[name] == (stats / name).read_bytes()
    card = files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    usage = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert usage["parameters"]["activation_stats"] == NAME
    assert not hub.private[NAME]


def test_what_lies_on_the_hub_is_a_statistics_directory(
    hub: FakeHub, stats: Path, tmp_path: Path
) -> None:
    assert push(stats, NAME, "--private").exit_code == 0
    assert hub.private[NAME]
    back = tmp_path / "back"
    back.mkdir()
    for name, content in hub.repositories[NAME].items():
        (back / name).write_bytes(content)
    opened = Statistics(NAME, back)
    assert [opened.stored(name) is not None for name in opened.names]


def test_the_second_time_needs_force(hub: FakeHub, stats: Path) -> None:
    assert push(stats, NAME).exit_code == 0
    again = push(stats, NAME)
    assert again.exit_code == 2
    assert "exists and holds" in again.output
    assert len(hub.commits) == 1
    assert push(stats, NAME, "--force").exit_code == 0
    assert len(hub.commits) == 2


def test_parts_of_former_statistics_go(hub: FakeHub, stats: Path) -> None:
    """An index that stayed would be read first, and name other tensors."""
    assert push(stats, NAME).exit_code == 0
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"):
        hub.repositories[NAME][name] = b"of before"
    assert push(stats, NAME, "--force").exit_code == 0
    left = hub.repositories[NAME].keys() - {".gitattributes", "notes.txt"}
    assert left == {one.name for one in stats.iterdir()}
    assert "notes.txt" in hub.repositories[NAME]


def test_a_dry_run_asks_nobody(hub: FakeHub, stats: Path) -> None:
    done = push(stats, NAME, "--dry-run")
    assert done.exit_code == 0
    assert "activation_stats.json" in done.output
    assert f"activation_stats: {NAME}" in done.output
    assert not hub.requests


def test_a_renamed_directory_gets_a_card_of_the_repositorys_name(hub: FakeHub, stats: Path) -> None:
    assert push(stats.rename(stats.with_name("elsewhere")), NAME, "--license", "mit").exit_code == 0
    assert f"activation_stats: {NAME}" in hub.repositories[NAME]["README.md"].decode()


def test_an_edited_card_stays_as_it_is(hub: FakeHub, stats: Path) -> None:
    text = (stats / "README.md").read_text() + "\nThanks to everybody.\n"
    (stats / "README.md").write_text(text)
    assert push(stats, NAME).exit_code == 0
    assert hub.repositories[NAME]["README.md"].decode() == text
    assert "was edited" in push(stats, NAME, "--license", "mit").output
    broken = text.replace("tags:", "base_model: []\ntags:")
    (stats / "README.md").write_text(broken)
    done = push(stats, NAME, "--force")
    assert done.exit_code == 2
    assert 'the Hub refuses the card: "base_model" does not contain any value' in done.output


def test_other_files_stay_here(hub: FakeHub, stats: Path) -> None:
    (stats / "notes.txt").write_text("private")
    assert push(stats, NAME).exit_code == 0
    assert "notes.txt" not in hub.repositories[NAME]


def test_what_is_refused_leaves_nothing(
    hub: FakeHub, stats: Path, family: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments, said in (
        ((stats, "tiny-stats"), "write org/name"),
        ((stats, "some one/stats"), "write org/name"),
        ((stats.parent / "absent", NAME), "no such directory"),
        ((family / "base", NAME), "no activation_stats.json"),
        ((stats, NAME, "--license", "none-such"), "the Hub refuses the card"),
    ):
        done = push(*arguments)
        assert (done.exit_code, said in done.output) == (2, True), done.output
    damaged = (stats / "model.safetensors").read_bytes()
    (stats / "model.safetensors").write_bytes(damaged[:-1] + bytes([damaged[-1] ^ 1]))
    assert push(stats, NAME).exit_code == 2
    (stats / "model.safetensors").write_bytes(damaged)
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    assert "use a token" in push(stats, NAME).output
    assert not hub.repositories


def test_offline_logged_out_and_out_of_order(
    hub: FakeHub, stats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.broken = "/commit/"
    done = push(stats, NAME)
    assert done.exit_code == 1, done.output
    assert hub.repositories[NAME].keys() == {".gitattributes"}
    hub.broken = ""
    assert push(stats, NAME).exit_code == 0  # an empty repository is nobody's
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in push(stats, NAME).output
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    done = push(stats, NAME)
    assert (done.exit_code, "HF_HUB_OFFLINE" in done.output) == (2, True), done.output
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    done = push(stats, NAME)
    assert (done.exit_code, "was not reached" in done.output) == (1, True), done.output


@pytest.mark.parametrize(
    ("model", "data", "base", "datasets"),
    [
        ({"reference": "./base"}, {"dataset": "./x.jsonl"}, None, None),
        ({"reference": "org/m@main", "revision": COMMIT}, {"dataset": "org/d"}, "org/m", ["org/d"]),
        ({"reference": "org/m+org/l", "revision": COMMIT}, {"dataset": "a/x.jsonl"}, "org/m", None),
        ({"reference": "/abs/m", "revision": COMMIT}, {"dataset": "wikitext"}, None, None),
        (
            {"reference": "gpt2", "revision": COMMIT},
            {"dataset": "org/d + ./own.txt", "mixture": [
                MixtureRecord(dataset=one, weight=1, column="text", sequences=1, tokens=1)
                for one in ("org/d", "./own.txt")
            ]},
            "gpt2",
            ["org/d"],
        ),
    ],
)  # fmt: skip
def test_cards_are_what_the_hub_accepts(
    family: Path,
    model: dict[str, object],
    data: dict[str, object],
    base: str | None,
    datasets: list[str] | None,
) -> None:
    metadata: Metadata = Statistics("stats", family / "stats").metadata
    changed = metadata.model_copy(
        update={
            "model": metadata.model.model_copy(update=model),
            "data": metadata.data.model_copy(update=data),
        }
    )
    card = statistics_card(changed, NAME)
    assert card_problem(card) is None
    front = yaml.safe_load(card.split("---\n")[1])
    assert front.get("base_model") == base
    assert front.get("datasets") == datasets
    assert "license" not in front
