"""Statistics of wrong content are refused: with one line that names them, and before a merge."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from mergekit_arm.errors import InputError
from mergekit_arm.statistics.kinds.importance import IMPORTANCE
from mergekit_arm.statistics.kinds.subspace import SUBSPACE
from mergekit_arm.statistics.read import Statistics
from tests.support.edits import edit
from tests.support.models import VOCABULARY

SITE = "model.layers.1.self_attn.q_proj"
WEIGHT = f"{SITE}.weight"
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory, measure: Callable[..., Path]) -> Path:
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("moe")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = MixtralConfig(vocab_size=VOCABULARY, **sizes, **heads)
    MixtralForCausalLM(config).save_pretrained(folder / "model")
    return measure(folder / "model", folder / "stats")


def changed(stats: Path, folder: Path, change: Change) -> Path:
    """Return a copy of ``stats`` after ``change`` of its metadata and tensors."""
    copy = shutil.copytree(stats, folder / "changed")
    tensors = load_file(copy / "model.safetensors")
    edit(copy, lambda metadata: change(metadata, tensors))
    save_file(tensors, copy / "model.safetensors")
    return copy


def refusal(stats: Path, folder: Path, change: Change, *, read: bool = False) -> str:
    """Return the one line with which the changed statistics are refused."""
    copy = changed(stats, folder, change)
    with pytest.raises(InputError) as error:
        read_all(copy) if read else Statistics("my-stats", copy)
    message = error.value.message
    assert message.startswith("activation_stats my-stats")
    assert "\n" not in message
    assert "measure" in message
    return message


def read_all(folder: Path) -> None:
    """Read what merges read of every weight."""
    opened = Statistics("my-stats", folder)
    for record in opened.metadata.weights.values():
        if record.site:
            IMPORTANCE.values(opened, record, "mean_abs")
            IMPORTANCE.values(opened, record, "rms")
            SUBSPACE.basis(opened, record, 0.9)


def weight(field: str, value: Any, name: str = WEIGHT) -> Change:
    return lambda metadata, _: metadata["weights"][name].__setitem__(field, value)


def site(field: str, value: Any) -> Change:
    return lambda metadata, _: metadata["sites"][SITE].__setitem__(field, value)


def setting(field: str, value: Any) -> Change:
    return lambda metadata, _: metadata["settings"].__setitem__(field, value)


def top(field: str, value: Any) -> Change:
    return lambda metadata, _: metadata.__setitem__(field, value)


def tensor(key: str, make: Callable[[Tensor], Tensor]) -> Change:
    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[key] = make(tensors[key]).contiguous()

    return change


def without(key: str) -> Change:
    return lambda _, tensors: tensors.__delitem__(key)


OPENING: list[tuple[str, Change, str]] = [
    ("width 1", tensor(f"{SITE}.abs_sum", lambda x: x[:1]), f"{SITE}.abs_sum has shape [1]"),
    ("0-d", tensor(f"{SITE}.abs_sum", lambda x: x[0]), f"{SITE}.abs_sum has shape []"),
    ("width n-1", tensor(f"{SITE}.square_sum", lambda x: x[:-1]), "has shape [31]"),
    ("integers", tensor(f"{SITE}.abs_sum", lambda x: x.long()), "of integers"),
    ("no sum", without(f"{SITE}.square_sum"), f"no tensor {SITE}.square_sum"),
    ("no basis", without(f"{SITE}.basis"), f"no tensor {SITE}.basis"),
    ("no probes", without("probes"), "no tensor probes"),
    ("probes of 31", tensor("probes", lambda x: x[:, :-1]), "probes has shape"),
    ("fewer probes", tensor("probes", lambda x: x[:3]), "of 3"),
    ("fewer columns", tensor(f"{SITE}.basis", lambda x: x[:, :-1]), "eigenvalues"),
    ("fewer values", tensor(f"{SITE}.eigenvalues", lambda x: x[:-1]), "eigenvalues"),
    ("basis of vectors", tensor(f"{SITE}.basis", lambda x: x[:, 0]), "basis has shape [32]"),
    ("basis of width", tensor(f"{SITE}.basis", lambda x: x[:-1]), "basis has shape [31"),
    ("trace of vectors", tensor(f"{SITE}.trace", lambda x: x[None]), "trace has shape [1]"),
    ("tokens", site("tokens", -5), f"sites.{SITE}.tokens"),
    ("token list", site("tokens", [3, 4]), "2 token counts"),
    ("no token list", site("tokens", []), f"sites.{SITE}.tokens"),
    ("tokens in words", site("tokens", "many"), f"sites.{SITE}.tokens"),
    ("width", site("width", 33), "33 channels"),
    ("width 0", site("width", 0), f"sites.{SITE}.width"),
    ("recorded k", site("subspace", 1), "1 recorded"),
    ("energy", site("energy", 1.5), f"sites.{SITE}.energy"),
    ("axis 0 on a square weight", weight("input_axis", 0), f"input_axis of {WEIGHT}"),
    ("axis 7", weight("input_axis", 7), f"input_axis of {WEIGHT} is 7"),
    ("axis -1", weight("input_axis", -1), f"weights.{WEIGHT}.input_axis"),
    ("no axis", weight("input_axis", None), f"input_axis of {WEIGHT} is None"),
    ("unknown site", weight("site", "model.nowhere"), "model.nowhere, which is no site"),
    ("row", weight("row", 99), f"row of {WEIGHT} is 99"),
    ("row 0", weight("row", 0), f"row of {WEIGHT} is 0"),
    ("probe", weight("probe", 9999), f"probe of {WEIGHT} is row 9999"),
    ("probe -1", weight("probe", -1), f"weights.{WEIGHT}.probe"),
    ("shape", weight("shape", [32, -1]), f"weights.{WEIGHT}.shape"),
    ("shape of one", weight("shape", [32]), f"input_axis of {WEIGHT}"),
    ("neither", weight("site", None), f"{WEIGHT} has neither"),
    ("unknown field", weight("colour", "red"), f"weights.{WEIGHT}.colour"),
    ("format -1", top("format_version", -1), "format_version"),
    ("format 0", top("format_version", 0), "format_version"),
    ("no sites", top("sites", {}), "sites"),
    ("weights as a list", top("weights", []), "weights"),
    ("rank", setting("rank", 0), "settings.rank"),
    ("fewest", setting("min_expert_tokens", -1), "settings.min_expert_tokens"),
    ("kinds", setting("kinds", ["x"]), "settings.kinds"),
]
READING: list[tuple[str, Change, str]] = [
    ("negative sums", tensor(f"{SITE}.abs_sum", lambda x: -x), f"{SITE}.abs_sum are below 0"),
    ("a NaN", tensor(f"{SITE}.abs_sum", lambda x: x * float("nan")), "not finite"),
    ("an infinity", tensor(f"{SITE}.square_sum", lambda x: x / 0), "not finite"),
    ("negative trace", tensor(f"{SITE}.trace", lambda x: -x), f"{SITE}.trace are below 0"),
    ("eigenvalues", tensor(f"{SITE}.eigenvalues", lambda x: -x), "eigenvalues are below 0"),
    ("NaN basis", tensor(f"{SITE}.basis", lambda x: x * float("nan")), "not finite"),
    ("scaled basis", tensor(f"{SITE}.basis", lambda x: 2 * x), "basis is damaged"),
]


@pytest.mark.parametrize(("change", "said"), [case[1:] for case in OPENING],
                         ids=[case[0] for case in OPENING])  # fmt: skip
def test_refused_when_opened(change: Change, said: str, family: Path, tmp_path: Path) -> None:
    assert said in refusal(family / "stats", tmp_path, change)


@pytest.mark.parametrize(("change", "said"), [case[1:] for case in READING],
                         ids=[case[0] for case in READING])  # fmt: skip
def test_refused_when_read(change: Change, said: str, family: Path, tmp_path: Path) -> None:
    assert said in refusal(family / "stats", tmp_path, change, read=True)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("tokens", [1, 2, 3], "3 experts"), ("tokens", 7, "has shape [4, "), ("width", 31, "31")],
)
def test_experts(field: str, value: Any, said: str, moe: Path, tmp_path: Path) -> None:
    def change(metadata: dict[str, Any], _: dict[str, Tensor]) -> None:
        name = next(name for name in metadata["sites"] if "experts" in name)
        metadata["sites"][name][field] = value

    Statistics("whole", moe)
    message = refusal(moe, tmp_path, change)
    assert said in message or "rows for the 3 token counts" in message or "row of" in message


@pytest.mark.parametrize(
    "file", ["../elsewhere.safetensors", "/tmp/x.safetensors", "a.bin", 3, "."]
)
def test_an_index_leads_to_no_other_place(file: Any, family: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(family / "stats", tmp_path / "s")
    shutil.copy(copy / "model.safetensors", tmp_path / "elsewhere.safetensors")
    names = load_file(copy / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, file)}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"^activation_stats s: .*index\.json"):
        Statistics("s", copy)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": ["probes"]}', "{", '{"weight_map": {"probes": "model.safetensors", "ghost": "model.safetensors"}}'])  # fmt: skip  # noqa: E501
def test_an_index_that_is_damaged(index: str, family: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(family / "stats", tmp_path / "s")
    (copy / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match=r"^activation_stats s: cannot read its tensors"):
        Statistics("s", copy)


class Trap:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path("sprung").touch, ()


def test_nothing_is_unpickled(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(family / "stats", tmp_path / "s")
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *_args, **_kwargs: pytest.fail("torch.load"))
    with pytest.raises(InputError, match=r"cannot read its tensors .*model\.safetensors"):
        Statistics("s", copy)
    assert not (tmp_path / "sprung").exists()


JUNK = st.sampled_from([None, -1, 0, 10**9, 1.5, "x", "", [], [1], {}, {"a": 1}, True])


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_a_field_holds_there_is_no_traceback(
    data: st.DataObject, family: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any one field of the JSON may become anything: it is opened, or refused in one line."""

    def change(metadata: dict[str, Any], _: dict[str, Tensor]) -> None:
        place: Any = metadata
        while True:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or not place[key] or data.draw(st.booleans()):
                place[key] = data.draw(JUNK)
                return
            place = place[key]

    copy = changed(family / "stats", tmp_path_factory.mktemp("junk"), change)
    opened, refused = None, None
    try:
        opened = Statistics("my-stats", copy)
    except InputError as error:
        refused = error.message
    if opened is None:
        assert refused
        assert refused.startswith("activation_stats my-stats")
        assert "\n" not in refused
        return
    for record in opened.metadata.weights.values():
        if record.site and "importance" in opened.metadata.settings.statistics:
            assert IMPORTANCE.values(opened, record, "mean_abs").isfinite().all()
